"""LoRA on the attention projections, with PEFT, over frozen experts that may be sharded."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from megablocks_utils.config import AdapterConfig
from megablocks_utils.errors import ConfigurationError

_ATTENTION_MODULE = "self_attn"


def find_attention_projections(model: nn.Module) -> list[str]:
    """Find the last names of the linear layers in the attention, sorted (q_proj, k_proj, ...).

    Raises:
        ConfigurationError: the model has none.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{_ATTENTION_MODULE}." in f".{name}."
    }
    if not names:
        raise ConfigurationError(
            f"--use_lora attn-only needs linear layers in modules named {_ATTENTION_MODULE}, and "
            f"model type {model.config.model_type} has none."
        )
    return sorted(names)


def apply_attention_lora(
    model: nn.Module, adapter: AdapterConfig, *, adapter_dtype: torch.dtype, seed: int
) -> PeftModel:
    """Freeze the model and attach trainable adapters to its attention projections.

    Call it before FSDP wraps the model, so that the adapters are sharded like everything else. The
    same seed gives every rank the same adapters, which FSDP relies on.
    """
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=0.0,
        target_modules=find_attention_projections(model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that transformers 5.23 has deprecated.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            peft_model = get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return peft_model
