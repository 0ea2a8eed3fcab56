"""Formats that frozen experts can be kept in, and what they take. Torch-free."""

import math
from collections.abc import Mapping
from typing import Any

from megablocks_utils.errors import ConfigurationError

__all__ = ["NO_QUANTIZATION", "QUANTIZATIONS", "check_quantization", "count_packed_bytes"]

NO_QUANTIZATION = "none"
QUANTIZATIONS = (NO_QUANTIZATION, "nf4", "int8", "fp8", "mxfp4")
"""Choices of `--expert_quantization`."""

_FP32 = 4
_KERNELS = ("auto", "eager", "grouped_mm", "triton")


def check_quantization(values: Mapping[str, Any]) -> None:
    """Refuse options that cannot be, or have not been proven, beside packed experts.

    Raises:
        ConfigurationError: naming both options.
    """
    name = values["expert_quantization"]
    if name == NO_QUANTIZATION:
        return
    named = f"--expert_quantization is {name}, but"
    if values["use_lora"] == "none":
        raise ConfigurationError(
            f"{named} --use_lora is none, which trains the experts, and packed weights are frozen: "
            "--use_lora must be attn-only, mlp-only or all, or --expert_quantization none."
        )
    kernel = "scattermoe" if values["use_scattermoe"] else values["kernel"]
    if kernel not in _KERNELS:
        raise ConfigurationError(
            f"{named} --kernel {kernel} has not been tried with it: it must be auto, "
            "eager, grouped_mm or triton."
        )


def count_packed_bytes(name: str, num_rows: int, num_columns: int) -> int:
    """Return what one expert's matrix (out, in) takes in a format."""
    if name == "nf4":
        num_scales = num_rows * math.ceil(num_columns / 64)
        return num_scales * 32 + num_scales + _FP32 * (math.ceil(num_scales / 256) + 1)
    if name == "int8":
        return num_rows * (num_columns + _FP32 * math.ceil(num_columns / 256))
    if name == "fp8":
        blocks = math.ceil(num_rows / 128) * math.ceil(num_columns / 128)
        return num_rows * num_columns + _FP32 * blocks
    assert name == "mxfp4", name
    return num_rows * math.ceil(num_columns / 32) * 17
