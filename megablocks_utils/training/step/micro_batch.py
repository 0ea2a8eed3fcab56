"""Run the model on one micro-batch and weigh its loss: the same for both entry points."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.objective import label_positions, token_loss_sum


@dataclass(frozen=True)
class LossWeights:
    """What the losses of a micro-batch count in its step.

    Attributes:
        num_label_tokens: label tokens of the whole global batch.
        num_micro_batches: micro-batches with examples of the whole global batch.
        aux_loss_coef: weight of the load-balancing loss; 0 leaves it out.
    """

    num_label_tokens: int
    num_micro_batches: int
    aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class MicroBatchLoss:
    """Losses of one micro-batch, scalars on the device.

    Attributes:
        objective: what to differentiate; its sum over all ranks and micro-steps is the step loss
            (plus the weighted auxiliary loss).
        token_loss_sum: sum of the token losses, detached.
        aux_loss: load-balancing loss before its coefficient, detached; None where left out.
    """

    objective: Tensor
    token_loss_sum: Tensor
    aux_loss: Tensor | None


def compute_micro_batch_loss(
    model: nn.Module, batch: MicroBatch, weights: LossWeights, device: torch.device
) -> MicroBatchLoss:
    """Run the forward pass on a packed micro-batch.

    The auxiliary loss is transformers' own, of this micro-batch's tokens; a step takes the mean
    over its micro-batches. A dummy takes part in every exchange and counts nothing.
    """
    positions, targets = label_positions(batch.labels)
    outputs = model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        logits_to_keep=positions.to(device),
        use_cache=False,
        output_router_logits=weights.aux_loss_coef > 0,
    )
    loss_sum = token_loss_sum(outputs.logits, targets.to(device))
    objective = loss_sum / weights.num_label_tokens
    if weights.aux_loss_coef == 0:
        return MicroBatchLoss(objective, loss_sum.detach(), None)
    share = 0.0 if batch.is_dummy else weights.aux_loss_coef / weights.num_micro_batches
    aux_loss = None if batch.is_dummy else outputs.aux_loss.detach()
    return MicroBatchLoss(objective + share * outputs.aux_loss, loss_sum.detach(), aux_loss)


def resolve_aux_loss_coef(model_config: PreTrainedConfig, given: float | None) -> float:
    """Return the weight of the load-balancing loss in this run.

    That of `--router_aux_loss_coef`; without it the model's own, if the model's config turns the
    loss on (`output_router_logits`), as in transformers.
    """
    if given is not None:
        return given
    if getattr(model_config, "output_router_logits", False):
        return float(model_config.router_aux_loss_coef)
    return 0.0
