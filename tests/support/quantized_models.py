"""Whole tiny models whose matrices are quantized as their families are published."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.quantized import COMPRESSED
from tests.support.tiny_families import save_tiny

QuantizeWeight = Callable[[str, Tensor], dict[str, Tensor]]
BLOCK = (16, 8)


def to_mxfp4(key: str, weight: Tensor) -> dict[str, Tensor]:
    """Replace GPT-OSS's experts (E, rows, columns) by random blocks of that shape."""
    if weight.dim() != 3:
        return {key: weight}
    num_experts, num_rows, num_columns = weight.shape
    blocks = torch.randint(0, 256, (num_experts, num_columns, num_rows // 32, 16))
    blocks[:, :, 0] &= 0x11  # 0 or 0.5: packed again, the exponent would be another
    scales = torch.randint(120, 126, blocks.shape[:-1])
    return {f"{key}_blocks": blocks.byte(), f"{key}_scales": scales.byte()}


def to_fp8(
    key: str, weight: Tensor, block: tuple[int, int] = BLOCK, largest: float = 448.0
) -> dict[str, Tensor]:
    """Quantize a matrix of a linear layer in blocks that fit into it.

    `largest` is what the largest number of a block becomes.
    """
    is_linear = weight.dim() == 2 and "_proj" in key
    if not is_linear or any(size % block for size, block in zip(weight.shape, block, strict=True)):
        return {key: weight}
    tiles = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scales = tiles.abs().amax((1, 3), keepdim=True) / largest
    packed = (tiles / scales).to(torch.float8_e4m3fn).reshape(weight.shape)
    return {key: packed, f"{key}_scale_inv": scales[:, 0, :, 0].contiguous()}


def to_int4(key: str, weight: Tensor) -> dict[str, Tensor]:
    """Pack the matrix of a routed expert as Kimi does."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if ".experts." not in key or weight.shape[1] % 32:
        return {key: weight}
    scheme = QuantizationScheme(targets=["Linear"], weights=COMPRESSED["kimi int4"][1])
    scale = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7).bfloat16()
    state = {"weight": weight, "weight_scale": scale}
    packed = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    module = key.removesuffix(".weight")
    return {f"{module}.{part}": tensor for part, tensor in packed.items()}


FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {"targets": ["re:.*experts.*"], "weights": COMPRESSED["kimi int4"][1]}
    },
}
PUBLISHED: dict[str, tuple[str, dict, QuantizeWeight, dict]] = {
    "gpt_oss": ("gpt_oss", {"quant_method": "mxfp4"}, to_mxfp4, {"intermediate_size": 64}),
    "deepseek_v3": ("deepseek_v3", FP8, to_fp8, {}),
    # Its numbers do not fill the range: packed again they would be other ones.
    "deepseek_v3, own blocks": (
        "deepseek_v3",
        FP8 | {"weight_block_size": [128, 128]},
        partial(to_fp8, block=(128, 128), largest=300.0),
        {"hidden_size": 128, "moe_intermediate_size": 128},
    ),
    "minimax_m2": ("minimax_m2", FP8, to_fp8, {}),
    "kimi": ("deepseek_v3", INT4, to_int4, {"moe_intermediate_size": 32}),
}
"""Family, what config.json says, how a weight is stored, and fields of its config."""


def save_quantized(name: str, folder: Path) -> Path:
    """Save a tiny model as it would be published, all other weights in float32."""
    family, settings, quantize, fields = PUBLISHED[name]
    save_tiny(family, folder, **fields)
    (file,) = folder.glob("*.safetensors")
    torch.manual_seed(0)
    stored: dict[str, Tensor] = {}
    for key, weight in load_file(file).items():
        stored |= quantize(key, weight)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
