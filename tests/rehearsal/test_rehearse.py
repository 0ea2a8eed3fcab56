"""What is rehearsed on fake tensors is what a step with real tensors allocates."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils.mesh.placement import is_replicated, mark_replicated
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.rehearsal import fewer_layers
from megablocks_utils.rehearsal.fewer_layers import keep_layers, rehearse_few_layers
from megablocks_utils.rehearsal.rehearse import Rehearsal
from tests.rehearsal.lone import (
    measure_alone,
    plan,
    rehearse_alone,
    rehearse_few_alone,
    rehearse_slowly,
)

NONE, SHARD, COPIES, WHOLE = (
    ParallelLayout(1, "shard"),
    ParallelLayout(4, "shard"),
    ParallelLayout(4, "replicate"),
    ParallelLayout(8, "shard"),
)
# What operators take inside themselves is not seen: packed matrices of a product, for one.
INSIDE_OPERATORS = 0.05
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "vocab_size": 1024,
}
NUM_DENSE_LAYER = 2 * 128 * 128 + 2 * 64 * 128 + 8 * 128 + 2 * 128
NUM_DENSE = 2 * NUM_DENSE_LAYER + 2 * 1024 * 128 + 128
NUM_EXPERTS = 2 * 8 * 3 * 128 * 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a config.json only."""
    path = tmp_path_factory.mktemp("model")
    MixtralConfig(**SIZES).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (NONE, {"label_tokens": 100, "precision": "bf16_sr", "accumulation": 1}),
        (WHOLE, {"gradient_checkpointing": "none", "examples": 3, "sync_each_batch": False}),
        (SHARD, {"gradient_checkpointing": "selective", "precision": "mixed", "use_lora": "all"}),
        (COPIES, {"entry_point": "fsdp1", "sync_each_batch": False}),
    ],
    ids=str,
)
def test_fakes_need_what_real_tensors_need(ranks1, folder, layout, changes):
    run = plan(tokens=256, **changes)
    [fake] = ranks1.run(rehearse_alone, folder, layout, run)
    [real] = ranks1.run(measure_alone, folder, layout, run)
    assert fake.peak_bytes == pytest.approx(real, rel=INSIDE_OPERATORS)


@pytest.mark.parametrize("layout", [SHARD], ids=str)
def test_short_cuts_change_no_byte(ranks1, folder, layout):
    """Remembered operators, and gradients that are there before the first micro-step."""
    run = plan(tokens=64, precision="bf16_sr", device_type="cuda")
    [fast] = ranks1.run(rehearse_alone, folder, layout, run)
    [slow] = ranks1.run(rehearse_slowly, folder, layout, run)
    assert fast == slow
    assert fast.components["gradients"] > 0


def test_a_copy_with_few_layers_keeps_what_was_said_of_parameters():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES))
    kept = model.model.layers[1].input_layernorm.weight
    mark_replicated(kept)
    fewer = keep_layers(model, [1])
    assert [n for n, p in fewer.named_parameters() if is_replicated(p)] == [
        "model.layers.0.input_layernorm.weight"
    ]
    assert (len(fewer.model.layers), len(model.model.layers)) == (1, 2)
    assert fewer.model.layers[0].input_layernorm.weight is not kept


@pytest.mark.parametrize(("num_layers", "rehearsed"), [(4, [4]), (5, [3, 4])])
def test_the_only_layer_left_of_its_kind_needs_no_rehearsal_of_its_own(
    monkeypatch, num_layers, rehearsed
):
    seen = []

    def record(model, *_args, **_options):
        seen.append(len(model.model.layers))
        return Rehearsal([], 0, {})

    monkeypatch.setattr(fewer_layers, "rehearse", record)
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES | {"num_hidden_layers": num_layers}))
    rehearse_few_layers(model, SHARD, plan(), device=torch.device("cpu"))
    assert seen == rehearsed


@pytest.mark.parametrize(("layout", "expert_share"), [(NONE, 8), (SHARD, 8), (COPIES, 4)], ids=str)
def test_static_bytes_by_hand(ranks1, folder, layout, expert_share):
    [fake] = ranks1.run(rehearse_alone, folder, layout, plan(tokens=16))
    held = 4 * (NUM_DENSE // 8 + NUM_EXPERTS // expert_share)
    assert fake.components["parameters"] == held
    assert fake.components["gradients"] == held
    # AdamW: two moments, and a number of 4 bytes for each of 12 parameters a layer and 3 more.
    num_parameters = 2 * 9 + 3
    assert fake.components["optimizer"] == 2 * held + 4 * num_parameters
    assert fake.allocated_bytes == pytest.approx(3 * held, rel=1e-3)


@pytest.mark.parametrize(("offload", "share"), [("params", 4), ("optimizer", 2)])
def test_offloaded_bytes_lie_in_host_memory(ranks1, folder, offload, share):
    """Of four times the weights: with gradients and both moments, or the moments alone."""
    run = plan(tokens=16, device_type="cuda", cpu_offload=offload, accumulation=1)
    [fake] = ranks1.run(rehearse_alone, folder, WHOLE, run)
    held = 4 * (NUM_DENSE // 8 + NUM_EXPERTS // 8)
    assert fake.host_bytes == pytest.approx(share * held, rel=1e-3)
    on_device = 0 if offload == "params" else held
    assert fake.allocated_bytes == pytest.approx(on_device, rel=1e-3)
    assert fake.components.get("parameters") == on_device


def test_own_experts_at_ep_1(ranks1, folder):
    """Every rank keeps all experts where they are copies, and an eighth where they are sharded."""
    for expert_dp, share in (("replicate", 1), ("shard", 8)):
        layout = ParallelLayout(1, expert_dp, is_dmoe=True)
        [fake] = ranks1.run(rehearse_alone, folder, layout, plan(tokens=16))
        assert fake.components["parameters"] == 4 * (NUM_DENSE // 8 + NUM_EXPERTS // share)


@pytest.fixture(scope="module")
def even(ranks1, folder):
    """What a run without any of the changes below needs."""
    return rehearse_plain(ranks1, folder)


def rehearse_plain(ranks1, folder, **changes):
    run = plan(tokens=512, gradient_checkpointing="none", **changes)
    return ranks1.run(rehearse_alone, folder, WHOLE, run)[0]


def test_the_busiest_rank_needs_more(ranks1, folder, even):
    hot = rehearse_plain(ranks1, folder, imbalance=2.0)
    # Of its 1024 rows more, a layer keeps rows (H), gate and up (2 I) and their product (I) in
    # fp32, and its order to and fro (only needed with several experts a rank: not here).
    more = 2 * 1024 * 4 * (128 + 3 * 256)
    assert hot.peak_bytes - even.peak_bytes == pytest.approx(more, rel=0.1)


def test_only_several_examples_need_a_mask(ranks1, folder, even):
    three = rehearse_plain(ranks1, folder, examples=3)
    # A mask (T, T) of bytes, and in both layers one in fp32; with a mask, keys and values of 4
    # heads are repeated for 8, of 16 numbers each.
    more = 512**2 + 2 * (4 * 512**2 + 2 * 4 * 512 * 4 * 16)
    assert three.peak_bytes - even.peak_bytes == pytest.approx(more, rel=0.1)
    padded = rehearse_plain(ranks1, folder, examples=4, packing="padded")
    # Of padded rows the masks are (4, T / 4, T / 4).
    less = (512 - 512 // 4) * 512 * (1 + 2 * 4)
    assert three.peak_bytes - padded.peak_bytes == pytest.approx(less, rel=0.1)


def test_the_triton_backend_keeps_less(ranks1, folder, even):
    lean = rehearse_plain(ranks1, folder, kernel="triton")
    # The activations (N, I) of each of two layers are not kept, in fp32.
    spared = 2 * 1024 * 4 * 256
    assert even.peak_bytes - lean.peak_bytes == pytest.approx(spared, rel=0.1)


def test_few_layers_say_what_all_of_them_need(ranks1, tmp_path):
    """With few layers the logits are the peak, with all of them the gradients."""
    MixtralConfig(**SIZES | {"num_hidden_layers": 8, "vocab_size": 4096}).save_pretrained(tmp_path)
    run = plan(tokens=128, accumulation=1, sync_each_batch=True)
    [whole] = ranks1.run(rehearse_alone, tmp_path, COPIES, run)
    [few] = ranks1.run(rehearse_few_alone, tmp_path, COPIES, run)
    assert few.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert few.allocated_bytes == whole.allocated_bytes
    assert few.sent_bytes_per_step == whole.sent_bytes_per_step
    assert few.components["gradients"] == whole.components["gradients"] > 0
