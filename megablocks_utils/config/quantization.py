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
# What has not been built or proven together with packed experts: option -> what it must be.
_ALONE: Mapping[str, Any] = {
    "expert_tp_size": 1,
    "tp_size": 1,
    "sp_size": 1,
    "dp_replicate_size": 1,
    "cpu_offload": "none",
    "compile": False,
    "expert_placement": "contiguous",
    "use_scattermoe": False,
}
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
    if values["expert_dp"] == "shard":
        raise ConfigurationError(
            f"{named} FSDP shards no packed weights: --expert_dp is shard and must be replicate."
        )
    if values["kernel"] not in _KERNELS:
        raise ConfigurationError(
            f"{named} --kernel {values['kernel']} has not been tried with it: it must be auto, "
            "eager, grouped_mm or triton."
        )
    for other, wanted in _ALONE.items():
        if values[other] != wanted:
            raise ConfigurationError(
                f"{named} --{other} is {values[other]}, which has not been tried with it: it must "
                f"be {wanted}."
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
