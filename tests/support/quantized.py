"""Tiny tensors as they are published in each packed form, and what they are by its definition.

The definitions are written out slowly, value by value or block by block, and share nothing with
the code that is tested.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CONFIG_NAME, FILE_NAME = "config.json", "model.safetensors"


@dataclass
class Packed:
    """What is stored, what config.json says of it, and what each weight is in float32."""

    settings: dict
    stored: dict[str, Tensor]
    weights: dict[str, Tensor]

    def write(self, folder: Path, *, nested: bool = False) -> Path:
        """Write it as a model folder; `nested`: the text model's configuration says it."""
        says = {"quantization_config": self.settings}
        config = {"model_type": "any", **({"text_config": says} if nested else says)}
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        save_file(self.stored, folder / FILE_NAME, metadata={"format": "pt"})
        return folder


def fp4_values(packed: Tensor) -> Tensor:
    """Return two values for each byte, the low half first."""
    rows = [
        [FP4[half] for byte in row for half in (byte & 15, byte >> 4)] for row in packed.tolist()
    ]
    return torch.tensor(rows)


def in_blocks(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of a matrix by its scale; the last blocks may be cut off."""
    result = torch.empty_like(values)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            scale = scales[row // block[0], column // block[1]]
            result[row, column] = values[row, column] * scale
    return result


def random_fp8(*shape: int) -> Tensor:
    """Return any 8-bit floats but NaN."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    bits[bits % 128 == 127] = 126
    return bits.view(torch.float8_e4m3fn)


def mxfp4() -> Packed:
    """GPT-OSS's experts: 3 of (64, 20) and a bias."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 20, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 20, 2), dtype=torch.uint8)
    experts = []
    for expert in range(3):
        values = fp4_values(blocks[expert].reshape(20, 32))
        powers = torch.tensor([[2.0 ** (e - 127) for e in row] for row in scales[expert].tolist()])
        experts.append(in_blocks(values, powers, (1, 32)).T)
    bias = torch.randn(3, 20).bfloat16()
    return Packed(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": bias},
        {name: torch.stack(experts), f"{name}_bias": bias},
    )


def fp8(rows: int = 12, columns: int = 16, block: tuple[int, int] = (4, 8)) -> Packed:
    """DeepSeek-V3: a matrix with float32 scales in blocks, and one that was left alone."""
    name, grid = (
        "model.layers.0.mlp.experts.1.up_proj.weight",
        (-(-rows // block[0]), -(-columns // block[1])),
    )
    weight, scales = random_fp8(rows, columns), torch.rand(grid) + 0.1
    plain = torch.randn(4, 4).bfloat16()
    return Packed(
        {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"},
        {name: weight, f"{name}_scale_inv": scales, "model.norm.weight": plain},
        {name: in_blocks(weight.float(), scales, block), "model.norm.weight": plain},
    )


def fp8_edge() -> Packed:
    """The last blocks are cut off, as in DeepSeek's kv_a_proj_with_mqa of 576 rows."""
    return fp8(10, 18)


def fp8_few_blocks() -> Packed:
    """Two blocks of 4 rows for 6: not two of 3."""
    return fp8(6, 16)


def fp8_per_tensor() -> Packed:
    """One scale for a matrix; a static scale of its activations has no use."""
    name, weight = "model.layers.0.self_attn.q_proj", random_fp8(6, 10)
    stored = {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.tensor(0.3)}
    return Packed(
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        {**stored, f"{name}.activation_scale": torch.tensor(0.5)},
        {f"{name}.weight": weight.float() * torch.tensor(0.3)},
    )


def deepseek_v4() -> Packed:
    """Experts of two 4-bit floats a byte in blocks of 32 beside 8-bit floats, scales of powers."""
    dense, expert = "model.layers.0.attn.wo_a", "model.layers.0.ffn.experts.0.w1"
    weight, packed = random_fp8(8, 16), torch.randint(-128, 128, (6, 32), dtype=torch.int8)
    powers = torch.randint(120, 131, (2, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    small = torch.randint(120, 131, (6, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = fp4_values(packed.view(torch.uint8))
    return Packed(
        {"quant_method": "fp8", "weight_block_size": [4, 8], "scale_fmt": "ue8m0"},
        {
            f"{dense}.weight": weight,
            f"{dense}.scale": powers,
            f"{expert}.weight": packed,
            f"{expert}.scale": small,
            "hc_head.scale": torch.ones(3),
        },
        {
            f"{dense}.weight": in_blocks(weight.float(), powers.float(), (4, 8)),
            f"{expert}.weight": in_blocks(values, small.float(), (1, 32)),
            "hc_head.scale": torch.ones(3),
        },
    )


def mxfp8() -> Packed:
    """Fused experts (2, 6, 64) of 8-bit floats in blocks of 32, scales as bytes of a power."""
    name = "model.layers.0.mlp.experts.w13_weight"
    weight = random_fp8(2, 6, 64)
    scales = torch.randint(120, 131, (2, 6, 2), dtype=torch.uint8)
    experts = [
        in_blocks(weight[e].float(), torch.exp2(scales[e].float() - 127), (1, 32)) for e in range(2)
    ]
    return Packed(
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        {name: weight, f"{name}_scale": scales},
        {name: torch.stack(experts)},
    )


FORMS = {
    form.__name__: form
    for form in (mxfp4, fp8, fp8_edge, fp8_few_blocks, fp8_per_tensor, deepseek_v4, mxfp8)
}


def compressed(storage: str, *, is_of_expert: bool = True, **weights: object) -> Packed:
    """A matrix (36, 64) that compressed-tensors has packed, and what it unpacks it to.

    Args:
        storage: the format.
        is_of_expert: whether the matrix is one of an expert.
        weights: the arguments of quantization.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=storage)
    args = scheme.weights
    matrix = torch.randn(36, 64).bfloat16()
    blocks = _blocks_of(matrix, args)
    extremes = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    scale, zero_point = calculate_qparams(*extremes, args)
    if args.strategy == "tensor":
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    compressor = BaseCompressor.get_value_from_registry(storage)
    state = {"weight": matrix, "weight_scale": scale.bfloat16(), "weight_zero_point": zero_point}
    packed = compressor.compress(state, scheme)
    module = f"model.layers.0.mlp.{'experts.3' if is_of_expert else 'shared_experts'}.up_proj"
    settings = {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
        "ignore": ["lm_head"],
    }
    stored = {f"{module}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    if storage == "float-quantized" and is_of_expert and args.strategy != "block":
        # What transformers does with the 8-bit floats of experts.
        whole = packed["weight"].float() * packed["weight_scale"].float()
    else:
        whole = compressor.decompress(packed, scheme)["weight"]
    return Packed(settings, stored, {f"{module}.weight": whole})


def _blocks_of(matrix: Tensor, args: object) -> Tensor:
    """View a matrix as (block rows, rows, block columns, columns): a scale for each block."""
    rows, columns = matrix.shape
    sizes = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    return matrix.reshape(rows // sizes[0], sizes[0], columns // sizes[1], sizes[1])


def int_args(bits: int, strategy: str, **more: object) -> dict[str, object]:
    """Return the arguments of integers of so many bits."""
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True, **more}


def float8_args(strategy: str, **more: object) -> dict[str, object]:
    """Return the arguments of 8-bit floats."""
    return {**int_args(8, strategy), "type": "float", **more}


COMPRESSED = {
    "kimi int4": ("pack-quantized", int_args(4, "group", group_size=32)),
    "int4 with zero points": (
        "pack-quantized",
        int_args(4, "group", group_size=16, symmetric=False),
    ),
    "int3 of channels": ("pack-quantized", int_args(3, "channel", symmetric=False)),
    "int8": ("int-quantized", int_args(8, "channel")),
    "int8 with zero points": ("int-quantized", int_args(8, "channel", symmetric=False)),
    "float8 of channels": ("float-quantized", float8_args("channel")),
    "float8 of a tensor": ("float-quantized", float8_args("tensor")),
    "float8 in blocks": ("float-quantized", float8_args("block", block_structure=[12, 16])),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "symmetric": True,
            "scale_dtype": "torch.uint8",
        },
    ),
    "mxfp8": (
        "mxfp8-quantized",
        float8_args("group", group_size=32, scale_dtype="torch.uint8"),
    ),
}
