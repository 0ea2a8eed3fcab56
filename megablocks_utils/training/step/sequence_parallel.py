"""Let ranks share the rows of a model, where its attention alone mixes tokens."""

import re
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel

from megablocks_utils.attention.implementation import own_implementation, set_implementation
from megablocks_utils.attention.ulysses import ULYSSES, RowMask, register_ulysses
from megablocks_utils.attention.whole_positions import show_longest_positions
from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.config import RunConfig
from megablocks_utils.config.parallel import check_heads
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.mesh.sequence_exchange import SequenceGroup, build_sequence_group
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_encoded
from megablocks_utils.training.data.row_parts import take_part
from megablocks_utils.training.data.text import IGNORED_LABEL
from megablocks_utils.training.step.forward import run_forward
from megablocks_utils.training.step.small_model import build_small_model

__all__ = ["apply_sequence_parallelism", "measure_parts", "share_rows"]

_HEADS = re.compile(r"(.*_)?num_attention_heads(_.*)?")
_LENGTHS = (11, 23, 14)
"""Tokens of the examples of a trial."""
_NUM_PARTS = 3
_SCALES, _SHORT_SCALE = ("floor_scale",), 4
"""Attributes of modules that count tokens from the start of a row, and what stands for them."""
_MASK_IS_READ = "it computes with the mask of its attention itself"
_MAX_ERROR = 1e-3
"""Largest difference of logits, over the largest."""


def apply_sequence_parallelism(
    config: RunConfig,
    model: PreTrainedModel,
    packing: Packing,
    device: torch.device,
    console: Console,
) -> SequenceGroup | None:
    """Let groups of `sp_size` ranks share their rows; None if each rank has its own.

    Call it when the model's attention is set, and before its experts are split.

    **Collective:** every rank must call (process groups are created).

    Raises:
        ConfigurationError: on every rank, for a model whose tokens are mixed elsewhere too, or
            whose heads cannot be shared.
    """
    parallel = config.parallel
    if parallel.sp_size == 1:
        return None
    text = model.config.get_text_config(decoder=True)
    heads, tp_size = list(_list_heads(text)), parallel.tp_size
    raise_on_all_ranks(lambda: check_heads(heads, parallel.sp_size, tp_size))
    row = config.data.packing_length or config.data.max_seq_length
    longest = row * config.optim.per_device_train_batch_size
    broadcast_from_rank0(lambda: _check_parts(model, packing, longest, device, parallel.sp_size))
    inner = own_implementation(model)
    group = share_rows(model, parallel.sp_size, device, parallel.tp_size)
    console.print(
        f"groups of {parallel.sp_size} processes share their rows; {inner} attention sees whole "
        "rows of a part of the heads",
        markup=False,
        soft_wrap=True,
    )
    return group


def share_rows(
    model: PreTrainedModel, sp_size: int, device: torch.device, tp_size: int = 1
) -> SequenceGroup:
    """Build the group of ranks that share rows with this one, and set the model's attention.

    **Collective:** every rank must call.
    """
    group = build_sequence_group(device.type, tp_size, sp_size)
    register_ulysses(own_implementation(model), group)
    set_implementation(model, ULYSSES)
    show_longest_positions(model)
    return group


def _list_heads(config: PreTrainedConfig) -> Iterator[int]:
    """Yield the numbers of heads of queries that a config tells, of some layers or of all."""
    values = config.to_dict() | {
        "num_attention_heads": getattr(config, "num_attention_heads", None)
    }
    for name, value in values.items():
        if _HEADS.fullmatch(name):
            counts = value if isinstance(value, list | tuple) else [value]
            yield from (count for count in counts if isinstance(count, int))


def _check_parts(
    model: PreTrainedModel, packing: Packing, longest: int, device: torch.device, sp_size: int
) -> None:
    """Refuse a model of which a part of a row's tokens cannot be computed alone."""

    def refusal(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"sp_size is {sp_size}, but it must be 1 for a model of type "
            f"{model.config.model_type}: {reason.rstrip('.')}.",
            parameters=("sp_size",),
        )

    try:
        with ForeignCode(ConfigurationError):
            small = build_small_model(model, device)
            _shorten_scales(small, longest)
            error = measure_parts(small, packing, device)
    except UserError as cause:
        reads_mask = RowMask.__name__ in str(cause)
        raise refusal(_MASK_IS_READ if reads_mask else str(cause)) from cause
    if not error <= _MAX_ERROR:
        raise refusal(
            "its tokens are mixed beside the attention that transformers' interface computes "
            f"(parts of a row differ from the whole by {error:.1e})"
        )


def _shorten_scales(small: PreTrainedModel, longest: int) -> None:
    """Let what a model does every so many tokens happen in a trial, where a row is as long."""
    for module in small.modules():
        for name in _SCALES:
            value = getattr(module, name, None)
            if isinstance(value, int | float) and value < longest:
                setattr(module, name, _SHORT_SCALE)


@torch.no_grad()
def measure_parts(small: PreTrainedModel, packing: Packing, device: torch.device) -> float:
    """Return how far a small model's logits of parts of a row are from those of the whole.

    Its attention lets each token see itself alone. The difference is over the largest logit.
    """
    register_ulysses(own_implementation(small), None)
    set_implementation(small, ULYSSES)
    show_longest_positions(small)
    batch = _build_batch(vocab_size(small), packing)
    whole = run_forward(small, batch, device)[1]
    parts = [
        run_forward(small, take_part(batch, _NUM_PARTS, part), device)[1]
        for part in range(_NUM_PARTS)
    ]
    return float((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max())


def _build_batch(num_words: int, packing: Packing) -> MicroBatch:
    """Return one row; padded ones are tried with a single example."""
    generator = np.random.RandomState(0)
    lengths = _LENGTHS if packing.is_one_row else _LENGTHS[:1]
    rows = [generator.randint(min(3, num_words - 1), num_words, n) for n in lengths]
    examples = [(ids, np.concatenate(([IGNORED_LABEL], ids[1:]))) for ids in rows]
    return collate_encoded(examples, packing if packing.is_one_row else Packing.ALONE)
