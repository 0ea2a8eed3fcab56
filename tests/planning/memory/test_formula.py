"""The formulas against the rehearsal, published rows, and their own ledger."""

import json
from dataclasses import replace
from itertools import product

import pytest

from megablocks_utils.planning.memory import formula
from megablocks_utils.planning.memory.formula import legal_layouts, predict
from megablocks_utils.planning.memory.ledger import Ledger
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import COMPONENTS, ParallelLayout
from tests.planning.cases import read_model
from tests.rehearsal.lone import plan, rehearse_alone

NONE, SHARD, COPIES, WHOLE = (
    ParallelLayout(1, "shard"),
    ParallelLayout(4, "shard"),
    ParallelLayout(4, "replicate"),
    ParallelLayout(8, "shard"),
)
AGREEMENT = 0.015
STATIC = ("parameters", "optimizer")
# Fakes cost the same whatever their size; in these the layers count as much as what is around them.
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 1024,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_experts": 32,
    "head_dim": 128,
    "vocab_size": 4096,
}
# A large vocabulary: two embeddings instead of one would be a tenth of the peak, and the logits are
# cut into blocks.
TIED = QWEN | {"tie_word_embeddings": True, "vocab_size": 2**17}
PUBLISHED = (
    # use_lora, layout, GB at the peak, rounded to whole ones
    ("none", NONE, 59),
    ("none", WHOLE, 49),
    ("attn-only", NONE, 22),
    ("attn-only", WHOLE, 14),
    ("attn-only", COPIES, 26),  # with MegaBlocks
    ("attn-only", COPIES, 25),  # with ScatterMoE
    ("all", COPIES, 26),
)
LONGEST_ALPACA_EXAMPLE = 1304  # tokens of Llama 2's tokenizer, by LitGPT's documentation


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Write a model's config.json; return its folder."""

    def folder_of(config):
        folder = tmp_path_factory.mktemp(config["model_type"])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return folder_of


@pytest.mark.parametrize(
    ("config", "layout", "changes"),
    [
        (MIXTRAL, NONE, {"use_lora": "mlp-only", "gradient_checkpointing": "none"}),
        (MIXTRAL, WHOLE, {"accumulation": 1, "precision": "bf16_sr", "has_whole_logits": True}),
        (MIXTRAL, WHOLE, {"gradient_checkpointing": "none", "examples": 3, "imbalance": 1.25}),
        (
            MIXTRAL,
            SHARD,
            {"gradient_checkpointing": "selective", "precision": "bf16", "device_type": "cuda"},
        ),
        (MIXTRAL, WHOLE, {"precision": "bf16", "device_type": "cuda", "cpu_offload": "params"}),
        (MIXTRAL, COPIES, {"use_lora": "attn-only", "kernel": "triton", "precision": "bf16"}),
        (
            QWEN,
            COPIES,
            {"gradient_checkpointing": "none", "has_aux_loss": True, "precision": "mixed"},
        ),
        (QWEN, ParallelLayout(2, "shard"), {"dp_replicate_size": 2}),
        # Ranks that share rows, and of four key heads two copies each.
        (MIXTRAL, WHOLE, {"sp_size": 8, "world_size": 8, "precision": "bf16", "use_lora": "all"}),
        (MIXTRAL, SHARD, {"sp_size": 2, "gradient_checkpointing": "selective"}),
        # Dense layers split over ranks with the same rows.
        (
            QWEN | {"mlp_only_layers": [0], "intermediate_size": 2048},
            ParallelLayout(2, "shard"),
            {"tp_size": 2, "use_lora": "all", "precision": "bf16"},
        ),
        (
            QWEN | {"vocab_size": 2**16},
            ParallelLayout(2, "shard"),
            {"tp_size": 2, "sp_size": 2, "dp_replicate_size": 2, "has_aux_loss": True},
        ),
        (
            MIXTRAL,
            ParallelLayout(2, "replicate"),
            {"tp_size": 4, "expert_tp_size": 2, "gradient_checkpointing": "none"},
        ),
        # Slices of experts: alone, and sharded over dp.
        (
            QWEN,
            ParallelLayout(2, "shard"),
            {"expert_tp_size": 2, "use_lora": "mlp-only", "gradient_checkpointing": "none"},
        ),
        (MIXTRAL, ParallelLayout(1, "replicate", is_dmoe=True), {"expert_tp_size": 4}),
        (
            MIXTRAL,
            COPIES,
            {
                "entry_point": "fsdp1",
                "sync_each_batch": False,
                "device_type": "cuda",
                "cpu_offload": "optimizer",
            },
        ),
        # Packed experts: whole ones over dp, rows of them, in host memory, in slices.
        (
            MIXTRAL,
            SHARD,
            {
                "packed_format": "nf4",
                "use_lora": "all",
                "gradient_checkpointing": "selective",
                "precision": "mixed",
                "device_type": "cuda",
            },
        ),
        (
            MIXTRAL,
            SHARD,
            {"packed_format": "int8", "use_lora": "all", "world_size": 12, "precision": "bf16"},
        ),
        (
            MIXTRAL,
            WHOLE,
            {
                "packed_format": "fp8",
                "use_lora": "all",
                "precision": "bf16",
                "device_type": "cuda",
                "cpu_offload": "params",
            },
        ),
        (
            MIXTRAL,
            ParallelLayout(2, "shard"),
            {"packed_format": "mxfp4", "use_lora": "all", "expert_tp_size": 2, "precision": "bf16"},
        ),
        # Looked up by the kernels.
        (
            MIXTRAL,
            SHARD,
            {"packed_format": "nf4", "kernel": "triton", "use_lora": "all", "precision": "bf16"},
        ),
        (
            TIED,
            SHARD,
            {
                "use_lora": "all",
                "gradient_checkpointing": "none",
                "precision": "mixed",
                "device_type": "cuda",
                "cpu_offload": "params",
            },
        ),
    ],
    ids=lambda value: (
        value.get("model_type", str(value)) if isinstance(value, dict) else str(value)
    ),
)
def test_formulas_and_rehearsal_say_the_same(ranks1, folder_of, config, layout, changes):
    run = plan(tokens=1024, **changes)
    [fake] = ranks1.run(rehearse_alone, folder_of(config), layout, run)
    told = predict(ModelShape.from_config(config), layout, run)
    assert told.peak_bytes == pytest.approx(fake.peak_bytes, rel=AGREEMENT)
    assert {name: told.components[name] for name in STATIC} == {
        name: fake.components[name] for name in STATIC
    }
    assert told.allocated_bytes == pytest.approx(fake.allocated_bytes, rel=1e-3)
    assert told.host_bytes == pytest.approx(fake.host_bytes, rel=AGREEMENT)
    assert told.sent == fake.sent


def test_legal_layouts():
    shape = ModelShape.from_config(read_model("mixtral-8x7b"))
    both = [ParallelLayout(n, how) for n in (2, 4) for how in ("shard", "replicate")]
    assert legal_layouts(shape, 8, "fsdp2") == [NONE, *both, WHOLE]
    copies = [ParallelLayout(n, "replicate") for n in (2, 4, 8)]
    assert legal_layouts(shape, 8, "fsdp1") == [NONE, *copies]
    # 3 divides the ranks only, 8 the experts only
    assert [layout.ep_size for layout in legal_layouts(shape, 12, "fsdp1")] == [1, 2, 4]
    assert legal_layouts(shape, 1, "fsdp2") == [NONE]


def published(use_lora, tokens=LONGEST_ALPACA_EXAMPLE):
    run = plan(tokens=tokens, precision="bf16", accumulation=16, use_lora=use_lora)
    # They were measured with all logits at once.
    return replace(
        run, device_type="cuda", sync_each_batch=use_lora == "none", has_whole_logits=True
    )


def test_published_peaks():
    shape = ModelShape.from_config(read_model("mixtral-8x7b"))
    errors = [
        predict(shape, layout, published(use_lora)).peak_bytes / 1e9 / peak - 1
        for use_lora, layout, peak in PUBLISHED
    ]
    assert max(map(abs, errors)) < 0.10
    assert sum(map(abs, errors)) / len(errors) < 0.05


def test_sharding_saves_what_ran_out_of_memory():
    shape = ModelShape.from_config(read_model("mixtral-8x7b"))
    copies, sharded = (predict(shape, layout, published("none")) for layout in (COPIES, SHARD))
    assert copies.peak_bytes > 85e9  # an A100 has about 85 GB
    assert sharded.peak_bytes == pytest.approx(50e9, rel=0.05)


@pytest.fixture
def ledgers(monkeypatch):
    """Every ledger that a prediction keeps."""
    kept = []

    def keep():
        kept.append(Ledger())
        return kept[-1]

    monkeypatch.setattr(formula, "Ledger", keep)
    return kept


@pytest.mark.parametrize("use_lora", ["none", "attn-only", "mlp-only", "all"])
@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3"])
def test_everything_that_is_taken_is_given_back(ledgers, model, use_lora):
    shape = ModelShape.from_config(read_model(model))
    # Every pair of checkpointing, kernel and accumulation, the last by turns.
    pairs = product(("full", "none", "selective"), ("grouped_mm", "triton"))
    changes = [
        {"gradient_checkpointing": checkpointing, "kernel": kernel, "accumulation": accumulation}
        for (checkpointing, kernel), accumulation in zip(pairs, (1, 2, 2, 1, 1, 2), strict=True)
    ]
    changes += [
        {"precision": "mixed"},
        {"sync_each_batch": False},
        {"world_size": 1},
        {"device_type": "cuda", "cpu_offload": "params"},
        {"device_type": "cuda", "cpu_offload": "optimizer"},
    ]
    for change in changes:
        for entry_point in ("fsdp2", "fsdp1"):
            run = plan(use_lora=use_lora, entry_point=entry_point, **change)
            for layout in legal_layouts(shape, run.world_size, entry_point)[:6:2]:
                told = predict(shape, layout, run)
                held = ledgers.pop().held
                passing = ("fsdp_buffers", "activations", "dispatch_buffers")
                assert [held[name] for name in passing] == [0, 0, 0], (layout, run)
                assert min(told.components[name] for name in COMPONENTS) >= 0
