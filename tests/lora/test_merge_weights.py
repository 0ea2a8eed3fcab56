"""AdapterMerger equals PEFT's merge_and_unload bit for bit, and holds one tensor at a time."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from megablocks_utils import merge
from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.lora import merge_weights
from megablocks_utils.merge import MergeOptions, merge_adapter
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_specs
from megablocks_utils.moe.rounded_experts import round_experts
from tests.support.merged import assert_same_model, merge_with_peft, save_base
from tests.support.tiny_adapters import PEFT_WARNINGS, save_fused_adapter, save_separate_adapter
from tests.support.tiny_models import FAMILIES

ADAPTERS = {"fused": save_fused_adapter, "separate": save_separate_adapter}
pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_bit_for_bit(tmp_path, family, kind, dtype, r):
    save_base(family, tmp_path / "base", dtype)
    ADAPTERS[kind](family, tmp_path / "adapter", r=r, lora_alpha=3)
    merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    line = merge_adapter(
        MergeOptions(str(tmp_path / "adapter"), tmp_path / "out", str(tmp_path / "base"))
    )
    assert_same_model(tmp_path / "out", tmp_path / "wanted")
    # 2 layers of 4 experts with 3 matrices, and 2 projections of the attention.
    base = open_checkpoint(tmp_path / "base")
    assert line == (
        f"wrote {tmp_path / 'out'}: 28 of {len(base.keys())} tensors changed,"
        f" {base.total_bytes:,} bytes"
    )


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_low_precision_are_added_in_full(tmp_path, kind, adapter_dtype):
    """As PEFT does, which casts them to float32 when it loads them."""
    for base_dtype in (torch.float32, torch.bfloat16):
        base, wanted, out = (tmp_path / f"{name}_{base_dtype}" for name in ("base", "want", "out"))
        save_base("mixtral", base, base_dtype)
        ADAPTERS[kind]("mixtral", tmp_path / "adapter", dtype=adapter_dtype)
        merge_with_peft(base, tmp_path / "adapter", wanted)
        merge_adapter(MergeOptions(str(tmp_path / "adapter"), out, str(base)))
        assert_same_model(out, wanted)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_base_with_tied_embeddings(tmp_path, kind, dtype):
    save_base("qwen3_moe", tmp_path / "base", dtype, fused=True, tie_word_embeddings=True)
    ADAPTERS[kind]("qwen3_moe", tmp_path / "adapter")
    merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted", fused=True)
    line = merge_adapter(
        MergeOptions(str(tmp_path / "adapter"), tmp_path / "out", str(tmp_path / "base"))
    )
    assert " 8 of " in line
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out")
    assert_same_model(tmp_path / "out", tmp_path / "wanted")


EVERYWHERE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MERGES = {
    "rank of a linear layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "rank in one layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 7}},
    "rank of experts": {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "only up": {"target_parameters": EVERYWHERE[:1]},
    "only down": {"target_parameters": EVERYWHERE[1:]},
    "only experts": {"target_modules": []},
    "one layer": {"layers_to_transform": [1]},
    "one layer by pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "one layer's experts": {"target_parameters": [f"layers.1.{name}" for name in EVERYWHERE]},
    "without a layer": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "by expression": {"target_modules": r".*self_attn\.[vo]_proj"},
    "all linear layers": {"target_modules": "all-linear", "target_parameters": None},
    "router": {"target_parameters": ["gate.weight", *EVERYWHERE]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved head": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "saved router and norm": {"modules_to_save": ["gate", "norm"]},
    "saved attention": {"target_modules": [], "modules_to_save": ["self_attn"]},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
}


def _randomise(peft_model):
    """Change the weights that PEFT saves besides adapters."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("name", MERGES)
def test_whatever_peft_merges_is_merged_alike(tmp_path, name):
    family, overrides = "olmoe", {"attention_bias": "bias" in name}
    save_base(family, tmp_path / "base", torch.bfloat16, **overrides)
    peft_model = save_fused_adapter(
        family, tmp_path / "adapter", overrides=overrides, **MERGES[name]
    )
    _randomise(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    merge_adapter(MergeOptions(str(tmp_path / "adapter"), tmp_path / "out", str(tmp_path / "base")))
    assert_same_model(tmp_path / "out", tmp_path / "wanted")
    base, wanted = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "wanted")
    assert any(not torch.equal(base.read(key), wanted.read(key)) for key in base)


def test_blocks_of_rows_change_no_element(tmp_path, monkeypatch):
    save_base("mixtral", tmp_path / "base", torch.bfloat16)
    save_fused_adapter("mixtral", tmp_path / "adapter")
    options = [str(tmp_path / "adapter"), tmp_path / "whole", str(tmp_path / "base")]
    merge_adapter(MergeOptions(*options))
    monkeypatch.setattr(merge_weights, "BLOCK_BYTES", 5 * 64 * 4)
    options[1] = tmp_path / "blocks"
    merge_adapter(MergeOptions(*options))
    assert_same_model(tmp_path / "blocks", tmp_path / "whole")


class PeakBytes(TorchDispatchMode):
    """Note the largest number of bytes that tensors hold at a time."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not result.is_meta:
            storage = result.untyped_storage()
            self.held[StorageWeakRef(storage).cdata] = (StorageWeakRef(storage), storage.nbytes())
            del storage
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.held.values()))
        return result


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_holds_one_tensor_and_a_block_of_what_is_added(tmp_path, monkeypatch, fused):
    block_bytes = 4096
    monkeypatch.setattr(merge_weights, "BLOCK_BYTES", block_bytes)
    save_base("mixtral", tmp_path / "base", torch.bfloat16, fused=fused, num_hidden_layers=2)
    save_fused_adapter("mixtral", tmp_path / "adapter", r=1)
    traced, write = PeakBytes(), merge._write

    def traced_write(*args):
        with traced:
            write(*args)

    # From here on: making the model on meta reserves each parameter for a moment, untouched.
    monkeypatch.setattr(merge, "_write", traced_write)
    merge_adapter(MergeOptions(str(tmp_path / "adapter"), tmp_path / "out", str(tmp_path / "base")))
    index = open_checkpoint(tmp_path / "base")
    largest = max(index.shape(key)[0] * index.read(key)[0].nbytes for key in index)
    # Those of one layer's experts in fp32, and as much again while B is read and checked.
    adapters = 4 * 4 * (64 + 192 + 96 + 64)
    assert largest < traced.peak <= largest + 2 * block_bytes + 2 * adapters
    assert traced.peak < index.total_bytes / (2 if fused else 5)


@pytest.mark.parametrize(
    ("family", "weight_format", "fused"),
    [("mixtral", "nf4", False), ("mixtral", "fp8", True), ("gpt_oss", "int8", False)],
)
def test_into_what_a_format_keeps_of_the_experts(tmp_path, family, weight_format, fused):
    """A base of rounded experts, of which gate and up share blocks, and PEFT's merge into it."""
    base, rounded = tmp_path / "base", tmp_path / "rounded"
    save_base(family, base, fused=fused)
    save_fused_adapter(family, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    exact = {name: p.clone() for name, p in find_projections(model).items()}
    round_experts(model, weight_format)
    squares = [
        ((p - exact[name]).square().sum(), exact[name].square().sum())
        for name, p in find_projections(model).items()
    ]
    off, whole = map(sum, zip(*squares, strict=True))
    model.save_pretrained(rounded, save_original_format=not fused)
    merge_with_peft(rounded, tmp_path / "adapter", tmp_path / "wanted", fused=fused)
    options = MergeOptions(
        str(tmp_path / "adapter"),
        tmp_path / "out",
        str(base),
        expert_quantization=weight_format,
    )
    line = merge_adapter(options)
    assert_same_model(tmp_path / "out", tmp_path / "wanted")
    assert f"that {weight_format} keeps, {100 * (off / whole) ** 0.5:.2g} % off" in line


def find_projections(model):
    modules = find_expert_modules(model)
    return {
        f"{name}.{projection}": modules[name].get_parameter(projection).detach()
        for name, spec in read_expert_specs(modules).items()
        for projection in spec.projections
    }
