"""Runs that train adapters of experts equal one process of stock transformers and PEFT.

Both sides start from the same adapter, one that PEFT has written, with B random: with a new one (B
zero) the first gradient of every A would be zero. Losses, gradient norms, every adapter's gradient
of the first step and every adapter after the last.
"""

from itertools import product

import pytest

from tests.support.fsdp1_run import train_fsdp1
from tests.support.parity import Layout, ParityCase, run_case, train_fsdp2
from tests.support.trace import measure_distance, measure_excess

BOUND = 1e-5  # relative; the contract's
# Times the distance of stock fp32 from fp64, where Adam makes it larger than the bound (2.4 seen).
MAX_EXCESS = 4
NUM_STEPS = 4  # into the second epoch, so a smaller last batch too
TRAIN = {"fsdp2": train_fsdp2, "fsdp1": train_fsdp1}

FSDP2_CASES = [
    ParityCase(Layout(4, 4), "mixtral", NUM_STEPS, lora="all", lora_rank=16),
    ParityCase(Layout(4, 2), "mixtral", NUM_STEPS, lora="mlp-only", lora_rank=4, accumulation=2),
    ParityCase(
        Layout(4, 2, "replicate"), "qwen3_moe", NUM_STEPS, lora="all", lora_rank=1, accumulation=2
    ),
    ParityCase(
        Layout(4, 1), "olmoe", NUM_STEPS, lora="all", lora_rank=16, checkpointing="selective"
    ),
    ParityCase(Layout(4, 1, "replicate"), "mixtral", NUM_STEPS, lora="mlp-only", lora_rank=1),
    ParityCase(Layout(2, 2), "qwen3_moe", NUM_STEPS, lora="all", lora_rank=16, kernel="eager"),
    # Sizes past the tiles of kernels, in rows and in columns.
    ParityCase(Layout(4, 2), "mixtral, wide", NUM_STEPS, lora="all", lora_rank=16),
    ParityCase(
        Layout(4, 4), "mixtral, wide", NUM_STEPS, lora="mlp-only", lora_rank=1, kernel="eager"
    ),
    # Experts without a token, and with ep 4 three ranks without any.
    ParityCase(Layout(4, 4), "olmoe, starved", NUM_STEPS, lora="all", lora_rank=4, accumulation=2),
    ParityCase(
        Layout(4, 2, "replicate"), "olmoe, starved", NUM_STEPS, lora="mlp-only", lora_rank=16
    ),
    # One expert a rank on dp 2, and a rank of 1: FSDP shards A by its columns.
    ParityCase(Layout(4, 2), "olmoe, 2 experts", NUM_STEPS, lora="mlp-only", lora_rank=1),
    # Without expert parallelism, and in one process.
    ParityCase(Layout(4, 0), "mixtral", NUM_STEPS, lora="all", lora_rank=4),
    ParityCase(Layout(1, 0), "qwen3_moe", NUM_STEPS, lora="mlp-only", lora_rank=16),
    # The auxiliary loss reaches the adapters through the hidden states alone.
    ParityCase(Layout(4, 2), "mixtral", NUM_STEPS, lora="all", lora_rank=4, aux_loss_coef=0.02),
    # Fewer examples than ranks: dummies.
    ParityCase(Layout(4, 4), "mixtral", 3, lora="all", lora_rank=4, num_examples=3),
    # Our Triton kernels, in the interpreter.
    ParityCase(
        Layout(2, 2), "mixtral", 2, lora="all", lora_rank=4, num_examples=3, kernel="triton"
    ),
]
FSDP1_CASES = [
    ParityCase(Layout(4, 2, "replicate"), "qwen3_moe", NUM_STEPS, lora="mlp-only", lora_rank=16),
    ParityCase(
        Layout(4, 2, "replicate"),
        "olmoe",
        NUM_STEPS,
        lora="all",
        lora_rank=1,
        accumulation=2,
        sync_each_batch=False,
        checkpointing="selective",
    ),
    ParityCase(Layout(4, 1, "replicate"), "mixtral, wide", NUM_STEPS, lora="mlp-only", lora_rank=4),
    ParityCase(
        Layout(4, 4, "replicate"), "olmoe, starved", NUM_STEPS, lora="mlp-only", lora_rank=4
    ),
    ParityCase(
        Layout(2, 2, "replicate"),
        "mixtral",
        NUM_STEPS,
        lora="all",
        lora_rank=16,
        checkpointing="False",
    ),
    ParityCase(Layout(4, 0, "replicate"), "mixtral", NUM_STEPS, lora="all", lora_rank=4),
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
