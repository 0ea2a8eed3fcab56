"""The load-balancing loss: the model's own, or transformers' formula on the model's router logits.

Many models give router logits and no loss. Their scores come from the logits by a function that is
recognised by values on a small model, see `small_model`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.mesh.sequence_exchange import SequenceGroup
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.routers import Routed, record_routing

__all__ = ["AuxLoss", "choose_aux_loss", "resolve_aux_loss_coef"]

_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": lambda probabilities: probabilities,
        "softmax": lambda logits: torch.softmax(logits, dim=-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    }
)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AuxLoss:
    """Where the load-balancing loss of a micro-batch comes from.

    Attributes:
        score: what makes scores of router logits; None where the model computes the loss itself.
        top_k: experts of a token.
    """

    score: str | None = None
    top_k: int = 0

    def of(self, outputs: Any, batch: MicroBatch, sequence: SequenceGroup | None = None) -> Tensor:
        """Return the loss of a micro-batch from a model's outputs; padding does not count.

        Where ranks share its rows, this rank's part: their sum is the loss of all tokens.

        **Collective:** then one all-reduce of E numbers on their group.
        """
        if self.score is None:
            return outputs.aux_loss
        scores = [_SCORES[self.score](logits.float()) for logits in outputs.router_logits]
        if sequence is not None:
            return _share_of_loss(torch.cat(scores), batch, self.top_k, sequence)
        # Logits whose softmax are the scores, over their sum.
        logits: Any = tuple(torch.log(s.clamp_min(torch.finfo(s.dtype).tiny)) for s in scores)
        mask = None if batch.attention_mask is None else batch.attention_mask.to(logits[0].device)
        loss = load_balancing_loss_func(logits, logits[0].shape[-1], self.top_k, mask)
        assert isinstance(loss, Tensor), "there are router logits"
        return loss


def _share_of_loss(
    scores: Tensor, batch: MicroBatch, top_k: int, sequence: SequenceGroup
) -> Tensor:
    """Return this rank's part of transformers' formula over the tokens of all ranks.

    It is E times the sum over experts of their share of rows, which has no gradient, and of their
    mean probability, to which each rank adds that of its tokens.

    Args:
        scores: (layers * t, E) of this rank's tokens.
        batch: the micro-batch.
        top_k: experts of a token.
        sequence: the ranks that share its rows.
    """
    num_experts, num_here = scores.shape[-1], batch.take_own(batch.input_ids).numel()
    probabilities = scores / scores.sum(-1, keepdim=True)
    rows = F.one_hot(probabilities.topk(top_k, dim=-1).indices, num_experts).sum(1).to(scores)
    num_layers, num_tokens = len(scores) // num_here, batch.input_ids.numel()
    if batch.attention_mask is not None:
        is_real = batch.take_own(batch.attention_mask).flatten().to(scores)
        is_real = is_real.repeat(num_layers)[:, None]
        probabilities, rows = probabilities * is_real, rows * is_real
        num_tokens = int(batch.attention_mask.sum())
    counts = rows.sum(0)
    dist.all_reduce(counts, group=sequence.group)
    return num_experts * (counts * probabilities.sum(0)).sum() / (num_layers * num_tokens) ** 2


def resolve_aux_loss_coef(model_config: PreTrainedConfig, given: float | None) -> float:
    """Return the weight of the load-balancing loss in this run.

    That of `--router_aux_loss_coef`; without it the model's own, if the model's config turns the
    loss on (`output_router_logits`), as in transformers.
    """
    if given is not None:
        return given
    for config in (model_config, model_config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            return float(getattr(config, "router_aux_loss_coef", 0.0))
    return 0.0


def choose_aux_loss(small: PreTrainedModel, coef: float, *, has_parts: bool = False) -> AuxLoss:
    """Find out what a model gives, on a small one of its class.

    Args:
        small: the small model.
        coef: weight of the loss.
        has_parts: whether ranks share rows: a model's own loss would be that of its part alone.

    Raises:
        ConfigurationError: it gives no auxiliary loss, and no router logits that are understood.
    """

    def refusal(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"router_aux_loss_coef is {coef:g}, but it must be 0 for a model of type "
            f"{small.config.model_type}: {reason}.",
            parameters=("router_aux_loss_coef",),
        )

    with ForeignCode(refusal):
        routed, outputs = record_routing(small, output_router_logits=True)
    if getattr(outputs, "aux_loss", None) is not None:
        found = _find_formula(small, outputs) if has_parts else AuxLoss()
        if found is None:
            raise refusal("its own loss is not transformers' formula, which sp_size needs")
        return found
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise refusal("it gives neither an auxiliary loss nor router logits")
    called = next(iter(routed.values()), None)
    if called is not None and called.top_k_index is not None:
        for name, score in _SCORES.items():
            if _is_score(score(logits[0].detach().float()), called):
                return AuxLoss(name, called.top_k_index.shape[-1])
    raise refusal("how it makes weights of its router logits is not known")


def _find_formula(small: PreTrainedModel, outputs: Any) -> AuxLoss | None:
    """Return transformers' formula if the model's own loss is that; None if it is another."""
    top_k = getattr(small.config.get_text_config(), "num_experts_per_tok", None)
    logits = getattr(outputs, "router_logits", None)
    if not isinstance(top_k, int) or not logits:
        return None
    loss = load_balancing_loss_func(logits, logits[0].shape[-1], top_k)
    is_same = torch.allclose(torch.as_tensor(loss), outputs.aux_loss.float(), rtol=_TOLERANCE)
    return AuxLoss("softmax", top_k) if is_same else None


def _is_score(scores: Tensor, routed: Routed) -> bool:
    """Say whether the experts' weights are these scores, up to a factor for each token."""
    assert routed.top_k_index is not None
    chosen = scores.gather(1, routed.top_k_index)
    ratio = routed.top_k_weights.detach() / chosen
    spread = ratio / ratio.mean(-1, keepdim=True) if ratio.shape[-1] > 1 else ratio / ratio.mean()
    return bool((spread - 1).abs().max() < _TOLERANCE)
