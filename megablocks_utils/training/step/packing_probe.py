"""Choose how the examples of a micro-batch are kept apart, by trying it on a small model.

Many models accept a packed row and let its examples see each other, without an error. So a packed
row's logits are compared with those of each example alone, as transformers computes them, on a
small model of the same class (see `small_model`), in the ways that `Packing` has, the cheapest
first: with `varlen` attention, then with the model's own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.attention.causal_blocks import CausalBlocks
from megablocks_utils.attention.implementation import (
    find_dropout,
    own_implementation,
    set_implementation,
)
from megablocks_utils.attention.varlen_attention import find_flash_fault
from megablocks_utils.attention.varlen_interface import VARLEN
from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_encoded
from megablocks_utils.training.data.text import IGNORED_LABEL
from megablocks_utils.training.step.forward import run_forward

__all__ = ["AUTO", "OWN", "PackingChoice", "choose_packing"]

AUTO = "auto"
OWN = "own"
"""Attention as the model is set to it."""
_LENGTHS = (11, 23, 14)
"""Tokens of the examples: longer than the windows of a small model, no multiple of a chunk."""
_MAX_ERROR = 1e-3
"""Largest difference, over the largest logit. Of 75 families the right ones have at most 5e-5, the
wrong ones at least 0.4."""
_MASK_IS_READ = "the model computes with the mask itself"
_IN_ONE_ROW = (Packing.POSITIONS, Packing.MASKS, Packing.SEQUENCES)
_LAYOUTS = {
    "auto": (*_IN_ONE_ROW, Packing.PADDED),
    "True": _IN_ONE_ROW,
    "False": (Packing.PADDED,),
}
_MEANINGS = {
    Packing.POSITIONS: "packed by positions",
    Packing.MASKS: "packed with explicit masks",
    Packing.SEQUENCES: "packed with sequence indices",
    Packing.PADDED: "padded with a mask",
    Packing.ALONE: "of one example each",
}


@dataclass(frozen=True)
class _Way:
    """A layout of micro-batches and the attention that keeps them apart.

    Attributes:
        packing: the layout.
        attention: implementation by its name.
    """

    packing: Packing
    attention: str

    @property
    def key(self) -> str:
        """Its name in a record."""
        return f"{self.packing.value}, {self.attention}"

    def describe(self) -> str:
        """Say it in a few words."""
        return f"{_MEANINGS[self.packing]}, {self.attention} attention"


@dataclass(frozen=True)
class PackingChoice:
    """How micro-batches are laid out, what attention they take, and why.

    Attributes:
        packing: the layout.
        attention: the implementation that the model must be set to.
        reason: one line.
        tried: what was measured of each way that was tried: the error over the largest logit, or
            what the model raised.
        probe_s: how long that took.
    """

    packing: Packing
    attention: str
    reason: str
    tried: dict[str, float | str]
    probe_s: float = 0.0

    def describe(self) -> str:
        """Say it in one line."""
        return f"{_Way(self.packing, self.attention).describe()}: {self.reason}"

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
    attention: str = OWN,
    own_attention: str = "",
    packing_length: int | None = None,
) -> PackingChoice:
    """Choose the first way that is right for this class of model.

    Args:
        build_small: builds a small model of the class, see `build_small_model`.
        packing: "auto", "True" (in one row) or "False" (padded).
        batch_size: examples of a micro-batch; one alone needs nothing.
        device: where the run computes.
        has_aux_loss: whether the model must also give router logits or an auxiliary loss.
        attention: "auto" (`varlen` where it is right), "varlen" or "own" (the model's, as it is).
        own_attention: the model's own by name. With "auto" one example takes `varlen` in place of
            "eager", which keeps the scores of all pairs of tokens.
        packing_length: tokens of rows that several examples must share; None: a row each will do.

    Raises:
        ConfigurationError: none of the ways asked for is right.
    """
    is_spared = attention == AUTO and own_attention == "eager"
    is_alone = batch_size == 1 and packing_length is None
    if is_alone and attention != VARLEN and not is_spared:
        return PackingChoice(Packing.ALONE, OWN, "one example a micro-batch", {})
    started_s = time.perf_counter()
    try:
        small = _build(build_small, batch_size, packing_length)
    except ConfigurationError as error:
        if not (is_spared and is_alone):
            raise
        return PackingChoice(Packing.ALONE, OWN, f"{VARLEN} could not be tried: {error}", {})
    probe = _Probe(small, device, has_aux_loss)
    layouts = _LAYOUTS[packing] if batch_size > 1 else (Packing.ALONE,)
    if packing_length is not None:
        layouts = _IN_ONE_ROW
    tried: dict[_Way, float | str] = {}
    for way in _list_ways(layouts, attention, own_implementation(small)):
        found = tried[way] = probe.measure(way)
        if isinstance(found, float) and found <= _MAX_ERROR:
            elapsed_s = time.perf_counter() - started_s
            record = {way.key: found for way, found in tried.items()}
            reason = _explain(tried)
            return PackingChoice(way.packing, way.attention, reason, record, round(elapsed_s, 4))
    if packing_length is not None:
        raise _no_packed_rows(small, packing_length, tried)
    raise _refusal(small, packing, batch_size, attention, tried)


def _build(
    build_small: Callable[[], PreTrainedModel], batch_size: int, packing_length: int | None
) -> PreTrainedModel:
    try:
        return build_small()
    except UserError as error:
        if packing_length is not None:
            raise ConfigurationError(
                f"{error} So packing_length is {packing_length}, but it must be left out: whether "
                "rows of several examples are right cannot be tried.",
                parameters=("packing_length",),
            ) from error
        if batch_size == 1:
            raise ConfigurationError(
                f"{error} So attn_implementation is {VARLEN}, but it must be auto: whether it is "
                "right cannot be tried.",
                parameters=("attn_implementation",),
            ) from error
        raise ConfigurationError(
            f"{error} So per_device_train_batch_size is {batch_size}, but it must be 1: "
            "whether batches are right cannot be tried.",
            parameters=("per_device_train_batch_size",),
        ) from error


def _list_ways(layouts: Sequence[Packing], attention: str, own: str) -> Iterator[_Way]:
    """Yield what is tried; masks of transformers' own say no more to `varlen` than it is told."""
    for layout in layouts:
        if attention != OWN and layout is not Packing.MASKS:
            yield _Way(layout, VARLEN)
        if attention != VARLEN:
            yield _Way(layout, own)


class _Probe:
    """A small model, examples, and their logits alone."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device, has_aux_loss: bool = False
    ) -> None:
        self._model, self._device, self._has_aux_loss = model, device, has_aux_loss
        self._own = own_implementation(model)
        generator = np.random.RandomState(0)
        tokens = vocab_size(model)
        rows = [generator.randint(min(3, tokens - 1), tokens, n) for n in _LENGTHS]
        self._examples = [(ids, np.concatenate(([IGNORED_LABEL], ids[1:]))) for ids in rows]
        with ForeignCode(ConfigurationError):
            self._alone = self._logits_alone()

    def measure(self, way: _Way) -> float | str:
        """Return the largest difference over the largest logit, or what the model raised."""
        try:
            with ForeignCode(ConfigurationError):
                if way.attention == VARLEN and (fault := self._find_fault()):
                    return fault
                set_implementation(self._model, way.attention)
                logits = self._logits_of(way.packing)
                return float((logits - self._alone).abs().max() / self._alone.abs().max())
        except UserError as error:
            return _MASK_IS_READ if CausalBlocks.__name__ in str(error) else str(error)
        finally:
            set_implementation(self._model, self._own)

    def _find_fault(self) -> str:
        """Return why `varlen` cannot be right, beside what logits show."""
        return find_dropout(self._model.config) or find_flash_fault(self._device)

    def _logits_of(self, packing: Packing) -> Tensor:
        if packing is Packing.ALONE:
            return self._logits_alone()
        return self._logits(collate_encoded(self._examples, packing))

    def _logits_alone(self) -> Tensor:
        alone = [self._logits(collate_encoded([e], Packing.ALONE)) for e in self._examples]
        return torch.cat(alone, dim=1)

    @torch.no_grad()
    def _logits(self, batch: MicroBatch) -> Tensor:
        outputs, logits, _ = run_forward(
            self._model, batch, self._device, router_logits=self._has_aux_loss
        )
        return logits


def _explain(tried: dict[_Way, float | str]) -> str:
    *wrong, chosen = tried
    error = tried[chosen]
    line = f"the probe's logits are those of each example alone (largest difference {error:.1e})"
    shown = [_show(way, tried[way]) for way in wrong]
    return f"{line}; not {'; not '.join(shown)}" if shown else line


def _show(way: _Way, found: float | str) -> str:
    measured = f"{found:.1e}" if isinstance(found, float) else found[:120]
    return f"{way.describe()} ({measured})"


def _no_packed_rows(
    model: PreTrainedModel, packing_length: int, tried: dict[_Way, float | str]
) -> ConfigurationError:
    found = [_show(way, tried[way]) for way in tried]
    return ConfigurationError(
        f"packing_length is {packing_length}, but it must be left out for a model of type "
        f"{model.config.model_type}: in a row of several examples logits differ from those of each "
        f"example alone: {join_words(found, 'and')}.",
        parameters=("packing_length",),
    )


def _refusal(
    model: PreTrainedModel,
    packing: str,
    batch_size: int,
    attention: str,
    tried: dict[_Way, float | str],
) -> ConfigurationError:
    found = [_show(way, tried[way]) for way in tried]
    family = f"for a model of type {model.config.model_type}"
    measured = f"logits differ from those of each example alone: {join_words(found, 'and')}"
    if attention == VARLEN:
        return ConfigurationError(
            f"attn_implementation is {VARLEN}, but it must be auto {family}: {measured}.",
            parameters=("attn_implementation",),
        )
    if packing == "auto":
        return ConfigurationError(
            f"per_device_train_batch_size is {batch_size}, but it must be 1 {family}: {measured}.",
            parameters=("per_device_train_batch_size",),
        )
    wanted = "False or auto" if packing == "True" else "True or auto"
    return ConfigurationError(
        f"packing is {packing}, but it must be {wanted} {family}: {measured}.",
        parameters=("packing",),
    )
