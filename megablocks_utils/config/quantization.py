"""Formats that frozen experts can be kept in, and what they take. Torch-free."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megablocks_utils.config.backends import AUTO, list_backends
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "BLOCKS",
    "NO_DENSE_NF4",
    "NO_QUANTIZATION",
    "QUANTIZATIONS",
    "check_packed_slices",
    "check_quantization",
    "count_packed_bytes",
    "count_unpacked",
    "find_format",
]

NO_QUANTIZATION = "none"
QUANTIZATIONS = (NO_QUANTIZATION, "nf4", "int8", "fp8", "mxfp4")
"""Choices of `--expert_quantization`."""

_FP32 = 4
# Tried on two gloo ranks with torch 2.13, torchao 0.18 and bitsandbytes 0.50.2.
NO_DENSE_NF4 = (
    "torchao's NF4 weights are sharded by FSDP2 in whole groups of 16,384 numbers alone and scaled "
    "by a mean over all ranks' parts, and bitsandbytes' lose their scales when they are sharded "
    "(--expert_quantization nf4 packs the experts, nine tenths of a model)"
)


def count_unpacked(device_type: str) -> int:
    """Return how many values are unpacked at a time: their fp32 copies are small beside a layer.

    On a CPU these stay in its cache; a GPU takes less time for them than starting its kernels does.
    """
    return 2**18 if device_type == "cpu" else 2**24


def find_format(choice: str) -> str | None:
    """Return the format of a choice of `--expert_quantization`; None where nothing is packed."""
    return None if choice == NO_QUANTIZATION else choice


def check_quantization(values: Mapping[str, Any], *, has_lora: bool) -> None:
    """Refuse options that cannot be, or have not been proven, beside packed experts.

    Args:
        values: of all options, by name.
        has_lora: whether adapters are trained.

    Raises:
        ConfigurationError: naming both options.
    """
    name = values["expert_quantization"]
    if name == NO_QUANTIZATION:
        return
    named = f"--expert_quantization is {name}, but"
    if not has_lora:
        raise ConfigurationError(
            f"{named} --use_lora is none, which trains the experts, and packed weights are frozen: "
            "--use_lora must be attn-only, mlp-only or all, or --expert_quantization none."
        )
    kernel = "scattermoe" if values["use_scattermoe"] else values["kernel"]
    wanted = [AUTO, *list_backends(with_packed=True)]
    if kernel not in wanted:
        raise ConfigurationError(
            f"{named} --kernel {kernel} has not been tried with it: it must be "
            f"{join_words(wanted)}."
        )


BLOCKS = MappingProxyType({"nf4": (1, 64), "int8": (1, 256), "fp8": (128, 128), "mxfp4": (1, 32)})
"""Rows and columns of a block, which no shard and no slice cuts, by format."""


def check_packed_slices(name: str, intermediate_size: int, expert_tp_size: int) -> None:
    """Refuse slices of packed experts that go through a block.

    Raises:
        ConfigurationError: naming the sizes that do not.
    """
    block = max(BLOCKS[name])
    num_blocks, rest = divmod(intermediate_size, block)
    fitting = [n for n in range(1, num_blocks + 1) if not rest and num_blocks % n == 0] or [1]
    if expert_tp_size not in fitting:
        raise ConfigurationError(
            f"expert_tp_size is {expert_tp_size}, but a slice of experts packed in {name} has "
            f"whole blocks of {block}, and their intermediate size is {intermediate_size}: it must "
            f"be {join_words(fitting)}.",
            parameters=("expert_tp_size",),
        )


def count_packed_bytes(
    name: str, num_rows: int, num_columns: int, *, num_slices: int = 1, num_shards: int = 1
) -> int:
    """Return what one expert's matrix (out, in), or a part of one, takes in a format.

    Args:
        name: of the format.
        num_rows: of the part.
        num_columns: likewise.
        num_slices: ranks that compute with other slices of the matrix.
        num_shards: in how many the rows are until they are gathered; this is one of them.
    """
    if name == "nf4":
        num_scales = num_rows * math.ceil(num_columns / 64)
        # The scales of scales are of the whole matrix, on which a slice has to say where its are.
        shared = math.ceil(num_scales * num_slices * num_shards / 256) + 1
        starts = num_rows if num_slices > 1 else 0
        return num_scales * 32 + num_scales + _FP32 * (shared + starts)
    if name == "int8":
        return num_rows * (num_columns + _FP32 * math.ceil(num_columns / 256))
    if name == "fp8":
        blocks = math.ceil(num_rows / 128) * math.ceil(num_columns / 128)
        return num_rows * num_columns + _FP32 * blocks
    assert name == "mxfp4", name
    return num_rows * math.ceil(num_columns / 32) * 17
