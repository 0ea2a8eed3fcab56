"""A training step of a whole model with adapters, both ways."""

import copy
import tempfile
import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from benchmarks.expert_lora.adapters import (
    OURS,
    PEFT,
    adapters_of,
    build_contender,
    build_lora_config,
    fill_b,
)
from benchmarks.harness.case import LayerShape
from benchmarks.harness.contender import Contender
from megablocks_utils.config import AdapterConfig
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.shard_moe_utils import shard_moe

_LEARNING_RATE = 1e-4
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a whole model."""

    experts: LayerShape
    num_layers: int
    vocab_size: int


@dataclass(frozen=True)
class Models:
    """The same model both ways, in two forms.

    Attributes:
        steps: a training step, which is measured.
        passes: from embeddings to logits and back, which is checked: it shows more than a loss.
    """

    steps: dict[str, Contender]
    passes: dict[str, Contender]


def build_models(shape: ModelSizes, num_tokens: int, backend: str, device: torch.device) -> Models:
    """Build a random Mixtral both ways: adapters on attention and experts.

    Ours is `shard_moe` with an ep axis of one rank, then the adapter that PEFT has written.
    """
    torch.manual_seed(0)
    config = _model_config(shape, num_tokens)
    stock = AutoModelForCausalLM.from_config(config, experts_implementation=backend)
    stock = stock.to(device).train()
    model = copy.deepcopy(stock)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5.23 has deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        peft = get_peft_model(stock, build_lora_config("mlp.experts", _ATTENTION, "CAUSAL_LM"))
    fill_b(peft)
    _resume_ours(model, peft, backend, device)
    tokens = torch.randint(shape.vocab_size, (1, num_tokens)).to(device)
    modules: dict[str, nn.Module] = {OURS: model, PEFT: peft}
    return Models(
        {name: _build_step(module, tokens) for name, module in modules.items()},
        {name: _build_pass(module, shape, num_tokens, device) for name, module in modules.items()},
    )


def _build_step(module: nn.Module, tokens: Tensor) -> Contender:
    def loss() -> Tensor:
        return module(input_ids=tokens, labels=tokens, use_cache=False).loss

    return build_contender(module, loss, {}, optimizer=_build_optimizer(module))


def _build_pass(
    module: nn.Module, shape: ModelSizes, num_tokens: int, device: torch.device
) -> Contender:
    generator = torch.Generator().manual_seed(1)
    size = (1, num_tokens, shape.experts.hidden_size)
    embeds = (0.02 * torch.randn(size, generator=generator)).to(device).requires_grad_()
    upstream = torch.randn(1, num_tokens, shape.vocab_size, generator=generator).to(device)

    def logits() -> Tensor:
        return module(inputs_embeds=embeds, use_cache=False).logits

    return build_contender(module, logits, {"inputs_embeds": embeds}, upstream)


def _resume_ours(
    model: PreTrainedModel, peft: PeftModel, backend: str, device: torch.device
) -> None:
    sharded = shard_moe(model, 1, kernel=backend, device_type=device.type)
    with tempfile.TemporaryDirectory() as folder:
        peft.save_pretrained(folder, save_embedding_layers=False)
        config = AdapterConfig(use_lora="all", resume_adapter=folder)
        adapters = choose_adapters(model, config)
        apply_lora(model, sharded, adapters, dtype=torch.float32, seed=0)


def _model_config(shape: ModelSizes, num_tokens: int) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=shape.experts.hidden_size,
        intermediate_size=shape.experts.intermediate_size,
        num_local_experts=shape.experts.num_experts,
        num_experts_per_tok=shape.experts.top_k,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max(512, num_tokens),
    )


def _build_optimizer(module: nn.Module) -> AdamW:
    """Build fused AdamW, which cannot take DTensors and plain tensors in one call."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for _, parameter in adapters_of(module):
        groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    parameters = [{"params": group} for group in groups.values()]
    return AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
