"""Choose how the examples of a micro-batch are kept apart, by trying it on a small model.

Many models accept a packed row and let its examples see each other, without an error. So a packed
row's logits are compared with those of each example alone, on a small model of the same class (see
`small_model`), in the ways that `Packing` has, the cheapest first.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_encoded
from megablocks_utils.training.data.text import IGNORED_LABEL
from megablocks_utils.training.step.forward import run_forward

__all__ = ["PackingChoice", "choose_packing"]

_LENGTHS = (11, 23, 14)
"""Tokens of the examples: longer than the windows of a small model, no multiple of a chunk."""
_MAX_ERROR = 1e-3
"""Largest difference, over the largest logit. Of 75 families the right ones have at most 5e-5, the
wrong ones at least 0.4."""
_IN_ONE_ROW = (Packing.POSITIONS, Packing.MASKS, Packing.SEQUENCES)
_CANDIDATES = {
    "auto": (*_IN_ONE_ROW, Packing.PADDED),
    "True": _IN_ONE_ROW,
    "False": (Packing.PADDED,),
}
_MEANINGS = {
    Packing.POSITIONS: "packed by positions",
    Packing.MASKS: "packed with explicit masks",
    Packing.SEQUENCES: "packed with sequence indices",
    Packing.PADDED: "padded with a mask",
}


@dataclass(frozen=True)
class PackingChoice:
    """How micro-batches are laid out, and why.

    Attributes:
        packing: the choice.
        reason: one line.
        tried: what was measured of each way that was tried: the error over the largest logit, or
            what the model raised.
        probe_s: how long that took.
    """

    packing: Packing
    reason: str
    tried: dict[str, float | str]
    probe_s: float = 0.0

    def describe(self) -> str:
        """Say it in one line."""
        return f"{_MEANINGS.get(self.packing, self.packing.value)}: {self.reason}"

    def as_record(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return asdict(self) | {"packing": self.packing.value}


def choose_packing(
    build_small: Callable[[], PreTrainedModel],
    *,
    packing: str,
    batch_size: int,
    device: torch.device,
    has_aux_loss: bool = False,
) -> PackingChoice:
    """Choose the first way that is right for this class of model.

    Args:
        build_small: builds a small model of the class, see `build_small_model`.
        packing: "auto", "True" (in one row) or "False" (padded).
        batch_size: examples of a micro-batch; one alone needs nothing.
        device: where the run computes.
        has_aux_loss: whether the model must also give router logits or an auxiliary loss.

    Raises:
        ConfigurationError: none of the ways asked for is right.
    """
    if batch_size == 1:
        return PackingChoice(Packing.ALONE, "one example a micro-batch", {})
    started_s = time.perf_counter()
    try:
        small = build_small()
    except UserError as error:
        raise ConfigurationError(
            f"{error} So per_device_train_batch_size is {batch_size}, but it must be 1: "
            "whether batches are right cannot be tried.",
            parameters=("per_device_train_batch_size",),
        ) from error
    probe = _Probe(small, device, has_aux_loss)
    tried: dict[str, float | str] = {}
    for candidate in _CANDIDATES[packing]:
        found = tried[candidate.value] = probe.measure(candidate)
        if isinstance(found, float) and found <= _MAX_ERROR:
            elapsed_s = time.perf_counter() - started_s
            reason = _explain(candidate, tried)
            return PackingChoice(candidate, reason, tried, round(elapsed_s, 4))
    raise _refusal(small, packing, batch_size, tried)


class _Probe:
    """A small model, examples, and their logits alone."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, has_aux_loss: bool = False
    ) -> None:
        self._model, self._device, self._has_aux_loss = model, device, has_aux_loss
        generator = np.random.RandomState(0)
        tokens = vocab_size(model)
        rows = [generator.randint(min(3, tokens - 1), tokens, n) for n in _LENGTHS]
        self._examples = [(ids, np.concatenate(([IGNORED_LABEL], ids[1:]))) for ids in rows]
        with ForeignCode(ConfigurationError):
            alone = [self._logits(collate_encoded([e], Packing.ALONE)) for e in self._examples]
        self._alone = torch.cat(alone, dim=1)

    def measure(self, packing: Packing) -> float | str:
        """Return the largest difference over the largest logit, or what the model raised."""
        try:
            with ForeignCode(ConfigurationError):
                logits = self._logits(collate_encoded(self._examples, packing))
                return float((logits - self._alone).abs().max() / self._alone.abs().max())
        except UserError as error:
            return str(error)

    @torch.no_grad()
    def _logits(self, batch: MicroBatch) -> Tensor:
        outputs, logits, _ = run_forward(
            self._model, batch, self._device, router_logits=self._has_aux_loss
        )
        return logits


def _explain(packing: Packing, tried: dict[str, float | str]) -> str:
    error = tried[packing.value]
    line = f"the probe's logits are those of each example alone (largest difference {error:.1e})"
    wrong = [f"{_MEANINGS[Packing(name)]} {_show(tried[name])}" for name in list(tried)[:-1]]
    return f"{line}; not {', '.join(wrong)}" if wrong else line


def _show(found: float | str) -> str:
    return f"({found:.1e})" if isinstance(found, float) else f"({found[:80]})"


def _refusal(
    model: PreTrainedModel, packing: str, batch_size: int, tried: dict[str, float | str]
) -> ConfigurationError:
    found = [f"{_MEANINGS[Packing(name)]} {_show(tried[name])}" for name in tried]
    measured = f"logits differ from those of each example alone: {join_words(found, 'and')}"
    if packing == "auto":
        return ConfigurationError(
            f"per_device_train_batch_size is {batch_size}, but it must be 1 for a model of type "
            f"{model.config.model_type}: {measured}.",
            parameters=("per_device_train_batch_size",),
        )
    wanted = "False or auto" if packing == "True" else "True or auto"
    return ConfigurationError(
        f"packing is {packing}, but it must be {wanted} for a model of type "
        f"{model.config.model_type}: {measured}.",
        parameters=("packing",),
    )
