"""Runs that train adapters of experts equal one process of stock transformers and PEFT.

Both sides start from the same adapter, one that PEFT has written, with B random: with a new one (B
zero) the first gradient of every A would be zero. Losses, gradient norms, every adapter's gradient
of the first step and every adapter after the last.
"""

from itertools import product

import pytest

from tests.support.fsdp1_run import train_fsdp1
from tests.support.parity import TWO_BATCHES, Layout, ParityCase, run_case, train_fsdp2
from tests.support.trace import measure_distance, measure_excess

BOUND = 1e-5  # relative; the contract's
# Times the distance of stock fp32 from fp64, where Adam makes it larger than the bound (2.4 seen).
MAX_EXCESS = 4
SHORT = {"num_steps": 2, "num_examples": TWO_BATCHES}  # the second batch is smaller
TRAIN = {"fsdp2": train_fsdp2, "fsdp1": train_fsdp1}

FSDP2_CASES = [
    # Into the second epoch.
    ParityCase(Layout(4, 4), "mixtral", num_steps=4, lora="all", lora_rank=16),
    ParityCase(
        Layout(4, 2, "replicate"), "qwen3_moe", lora="all", lora_rank=1, accumulation=2, **SHORT
    ),
    ParityCase(Layout(4, 1), "olmoe", lora="all", lora_rank=16, checkpointing="selective", **SHORT),
    ParityCase(Layout(4, 1, "replicate"), "mixtral", lora="mlp-only", lora_rank=1, **SHORT),
    ParityCase(Layout(2, 2), "qwen3_moe", lora="all", lora_rank=16, kernel="eager", **SHORT),
    # Sizes past the tiles of kernels, in rows and in columns.
    ParityCase(Layout(4, 4), "mixtral, wide", lora="mlp-only", lora_rank=1, **SHORT),
    # Experts without a token, and with ep 4 in their own order three ranks without any.
    ParityCase(
        Layout(4, 4),
        "olmoe, starved",
        lora="all",
        lora_rank=4,
        accumulation=2,
        placement="balanced",
        **SHORT,
    ),
    ParityCase(Layout(4, 2, "replicate"), "olmoe, starved", lora="mlp-only", lora_rank=16, **SHORT),
    # One expert a rank on dp 2, and a rank of 1: FSDP shards A by its columns.
    ParityCase(Layout(4, 2), "olmoe, 2 experts", lora="mlp-only", lora_rank=1, **SHORT),
    # Without expert parallelism, and in one process.
    ParityCase(Layout(4, 0), "mixtral", lora="all", lora_rank=4, **SHORT),
    ParityCase(Layout(1, 0), "qwen3_moe", lora="mlp-only", lora_rank=16, **SHORT),
    # The auxiliary loss reaches the adapters through the hidden states alone.
    ParityCase(
        Layout(4, 2),
        "mixtral",
        lora="all",
        lora_rank=4,
        accumulation=2,
        aux_loss_coef=0.02,
        placement="balanced",
        **SHORT,
    ),
    ParityCase(
        Layout(4, 1, expert_tp_size=2), "qwen3_moe", lora="mlp-only", accumulation=2, **SHORT
    ),
    # Packed experts, against PEFT on what they dequantize to: in shards of rows, in slices.
    ParityCase(
        Layout(4, 2),
        "mixtral, 6 experts",
        lora="all",
        lora_rank=4,
        accumulation=2,
        quantization="nf4",
        **SHORT,
    ),
    ParityCase(
        Layout(4, 1, expert_tp_size=2),
        "mixtral, 6 experts",
        lora="all",
        lora_rank=4,
        quantization="fp8",
        **SHORT,
    ),
    # Parts by name: routers of a class of their own, the head, shared experts and dense MLPs.
    ParityCase(
        Layout(4, 2),
        "mixtral",
        lora="experts,attention,router,lm_head",
        lora_rank=4,
        accumulation=2,
        **SHORT,
    ),
    ParityCase(Layout(4, 2), "deepseek_v3", lora="shared,router", lora_rank=4, **SHORT),
    # Fewer examples than ranks: dummies.
    ParityCase(Layout(4, 4), "mixtral", num_steps=2, lora="all", lora_rank=4, num_examples=3),
]
FSDP1_CASES = [
    ParityCase(
        Layout(4, 2, "replicate"),
        "qwen3_moe",
        lora="mlp-only",
        lora_rank=16,
        placement="balanced",
        **SHORT,
    ),
    ParityCase(
        Layout(4, 2, "replicate"),
        "olmoe",
        lora="all",
        lora_rank=1,
        accumulation=2,
        sync_each_batch=False,
        checkpointing="selective",
        **SHORT,
    ),
    ParityCase(Layout(4, 1, "replicate"), "mixtral", lora="mlp-only", lora_rank=4, **SHORT),
    ParityCase(
        Layout(4, 2, "replicate", expert_tp_size=2),
        "mixtral",
        lora="mlp-only",
        lora_rank=4,
        **SHORT,
    ),
    ParityCase(Layout(4, 4, "replicate"), "olmoe, starved", lora="mlp-only", lora_rank=4, **SHORT),
    ParityCase(
        Layout(2, 2, "replicate"),
        "mixtral",
        lora="all",
        lora_rank=16,
        checkpointing="False",
        **SHORT,
    ),
    ParityCase(Layout(4, 0, "replicate"), "mixtral", lora="all", lora_rank=4, **SHORT),
    ParityCase(
        Layout(4, 2, "replicate"),
        "qwen3_moe",
        lora="mlp-only",
        quantization="mxfp4",
        checkpointing="False",
        **SHORT,
    ),
    ParityCase(
        Layout(2, 2, "replicate"), "olmoe", lora="experts,router,lm_head", lora_rank=4, **SHORT
    ),
    # Our Triton kernels, in the interpreter; they look packed weights up.
    ParityCase(
        Layout(2, 2, "replicate"),
        "mixtral, one layer",
        num_steps=2,
        lora="all",
        lora_rank=4,
        num_examples=2,
        kernel="triton",
    ),
]
CASES = [("fsdp2", case) for case in FSDP2_CASES] + [("fsdp1", case) for case in FSDP1_CASES]


@pytest.mark.parametrize(("script", "case"), CASES, ids=str)
def test_run_equals_one_process_of_peft(pools, parity_folder, script, case):
    wanted = parity_folder.reference(parity_folder.stock_run(case))
    seen = run_case(pools, parity_folder, case, TRAIN[script])
    distance = measure_distance(seen, wanted)
    assert distance.loss < BOUND, distance
    assert distance.grad_norm < BOUND, distance
    assert distance.first_gradient < BOUND, distance
    if distance.weight >= BOUND:
        exact = parity_folder.reference(parity_folder.stock_run(case, "float64"))
        assert measure_excess(seen, wanted, exact, floor=BOUND) < MAX_EXCESS, distance


def test_cases_cover_what_is_promised():
    """Every rank with every ep size on four ranks, over both scripts."""
    seen = {(case.lora_rank, case.layout.ep_size) for _, case in CASES}
    assert set(product((1, 4, 16), (1, 2, 4))) - seen == set()
