"""PEFT adapters of the tiny models, in both formats, with random weights on both sides."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import build_tiny_model

# PEFT's own: it asks transformers by a name of old, and looks for patterns among modules only.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ("k_proj", "q_proj")
# Names that the families' linear layers had in transformers 4: block, then gate, up and down.
OLD_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
SIZES = ((96, 64), (96, 64), (64, 96))  # (out, in) of gate, up and down in a tiny model


def attach_random_adapters(
    model: PreTrainedModel,
    config: LoraConfig,
    dtype: torch.dtype = torch.float32,
    *,
    std: float = 0.1,
) -> PeftModel:
    """Attach PEFT's own adapters, A and B random with standard deviation `std`."""
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.data = noise.to(dtype)
    return peft_model.eval()


def save_fused_adapter(
    family: str,
    folder: str | Path,
    *,
    r: int = 4,
    lora_alpha: int = 8,
    dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, object] = MappingProxyType({}),
    **options: object,
) -> PeftModel:
    """Write an adapter on attention and experts with PEFT, and return its model.

    `overrides` are options of the model's config; `options` are more of LoraConfig, or others than
    `ATTENTION` and both experts' projections.
    """
    targets = {
        "target_modules": list(ATTENTION),
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, lora_dropout=0.0, **targets | options
    )
    peft_model = attach_random_adapters(build_tiny_model(family, **overrides), config, dtype)
    peft_model.save_pretrained(folder)
    return peft_model


def save_separate_adapter(
    family: str,
    folder: str | Path,
    *,
    r: int = 4,
    lora_alpha: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Write an adapter as PEFT did with transformers 4, each expert by itself; return its tensors.

    The attention's are those that `save_fused_adapter` writes.
    """
    folder = Path(folder)
    save_fused_adapter(family, folder, r=r, lora_alpha=lora_alpha, dtype=dtype)
    block, projections = OLD_NAMES[family]
    generator = torch.Generator().manual_seed(2)

    def replace(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            del tensors[key]
        for layer in range(2):
            for expert in range(4):
                prefix = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}"
                for projection, (num_rows, num_columns) in zip(projections, SIZES, strict=True):
                    for side, shape in (("A", (r, num_columns)), ("B", (num_rows, r))):
                        noise = torch.randn(shape, generator=generator) * 0.1
                        tensors[f"{prefix}.{projection}.lora_{side}.weight"] = noise.to(dtype)

    edit_tensors(folder, replace)
    edit_settings(folder, target_modules=[*ATTENTION, *projections], target_parameters=None)
    return load_file(folder / WEIGHTS)


def edit_tensors(folder: str | Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an adapter in place."""
    path = Path(folder) / WEIGHTS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_settings(folder: str | Path, **changes: object) -> None:
    """Change entries of an adapter's configuration."""
    path = Path(folder) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expert_deltas(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return what PEFT would add to each parameter of experts, by its name in the base model."""
    deltas = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, ParamWrapper):
            module_name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            delta = module.get_delta_weight("default").detach()
            deltas[f"{module_name}.{module.parameter_name}"] = delta
    return deltas
