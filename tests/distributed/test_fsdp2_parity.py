"""Whole FSDP2 runs on real ranks equal one process of stock transformers.

Losses, gradient norms, every gradient of the first step and every final weight, in fp32. The cases
cover each pair of options at least once; the full matrix is `benchmarks/parity.py`.

What a planted bug is caught by is listed in tests/README.md.
"""

from itertools import combinations, product

import pytest

from tests.support.parity import LAYOUTS, TWO_BATCHES, Layout, ParityCase, run_case
from tests.support.trace import measure_distance

BOUND = 1e-5  # relative; the contract's
SHORT = {"num_steps": 2, "num_examples": TWO_BATCHES}  # the second batch is smaller

# layout, model, (accumulation, sync_each_batch), checkpointing, aux loss, LoRA, clipped
PAIRS = [
    (0, "mixtral", (1, True), "True", False, True, True),
    (0, "qwen3_moe", (2, True), "selective", True, False, False),
    (0, "olmoe", (2, False), "False", False, False, False),
    (1, "mixtral", (2, True), "False", True, True, True),
    (1, "qwen3_moe", (2, False), "True", False, False, False),
    (1, "olmoe", (1, True), "selective", True, False, True),
    (2, "mixtral", (2, False), "selective", True, False, True),
    (2, "qwen3_moe", (1, True), "False", True, True, False),
    (2, "olmoe", (2, True), "True", False, False, True),
    (3, "mixtral", (1, True), "True", True, True, False),
    (3, "qwen3_moe", (2, True), "selective", False, False, True),
    (3, "olmoe", (2, False), "False", False, False, True),
    (4, "mixtral", (2, True), "False", True, False, True),
    (4, "qwen3_moe", (2, False), "True", True, True, True),
    (4, "olmoe", (1, True), "selective", False, True, False),
]
# On CPUs nothing moves, but FSDP has the experts also where one rank holds them (layouts 1 and 4).
OFFLOADED = {
    (1, "mixtral"): "params",
    (1, "qwen3_moe"): "params",
    (2, "olmoe"): "params",
    (3, "mixtral"): "optimizer",
    (4, "olmoe"): "optimizer",
}
PLACED = {(2, "qwen3_moe"), (3, "olmoe")}  # experts lie on the ranks in another order


def _case(layout, model, accumulation, checkpointing, aux, lora, clipped):
    return ParityCase(
        LAYOUTS[layout],
        model,
        accumulation=accumulation[0],
        sync_each_batch=accumulation[1],
        checkpointing=checkpointing,
        aux_loss_coef=0.02 if aux else 0.0,
        lora="attn-only" if lora else "none",
        max_grad_norm=1.0 if clipped else 0.0,
        weight_decay=0.0 if clipped else 0.1,
        cpu_offload=OFFLOADED.get((layout, model), "none"),
        placement="balanced" if (layout, model) in PLACED else "contiguous",
        **SHORT,
    )


GROUPS = [
    # Experts in one copy a group, which FSDP does not hold; sharded over dp; copied over dp too.
    ParityCase(Layout(4, 2, groups=2), accumulation=2, **SHORT),
    ParityCase(Layout(4, 1, groups=2), "qwen3_moe", accumulation=2, sync_each_batch=False, **SHORT),
    ParityCase(Layout(4, 1, "replicate", 2), "gpt_oss", accumulation=2, **SHORT),
    # No expert parallelism; a group of one rank.
    ParityCase(Layout(4, 0, groups=2), accumulation=2, aux_loss_coef=0.02, **SHORT),
    ParityCase(Layout(4, 1, groups=4), checkpointing="selective", **SHORT),
]
SLICES = [
    # Gate and up side by side, biases; ranks without tokens; gate behind gate, sharded over dp.
    ParityCase(
        Layout(4, 2, expert_tp_size=2),
        "gpt_oss",
        checkpointing="selective",
        placement="balanced",
        **SHORT,
    ),
    ParityCase(Layout(4, 1, "replicate", expert_tp_size=4), num_steps=2, num_examples=3),
    ParityCase(Layout(4, 1, expert_tp_size=2), accumulation=2, sync_each_batch=False, **SHORT),
]
SEQUENCES = [
    # Sinks, windows and masks; fewer key heads than ranks, padded rows, fewer tokens than ranks.
    ParityCase(Layout(4, 2, sp_size=2), "gpt_oss", lora="attn-only", aux_loss_coef=0.02, **SHORT),
    ParityCase(Layout(4, 2, "replicate", sp_size=4), attention="eager", packing="False", **SHORT),
    ParityCase(
        Layout(2, 2, sp_size=2),
        "qwen3_moe",
        num_steps=2,
        num_examples=3,
        accumulation=8,
        checkpointing="selective",
    ),
]
COMPOSED = [
    # A head's share of tokens after its share of heads, where all ranks have the same rows; slices
    # beside parts of rows; three axes of what is not experts.
    ParityCase(
        Layout(4, 2, tp_size=2, sp_size=2), "gpt_oss", accumulation=2, aux_loss_coef=0.02, **SHORT
    ),
    ParityCase(
        Layout(4, 1, sp_size=2, expert_tp_size=2), "qwen3_moe", checkpointing="selective", **SHORT
    ),
    ParityCase(Layout(4, 2, groups=2, tp_size=2), accumulation=2, sync_each_batch=False, **SHORT),
]
SPECIAL = [
    # One expert a rank on dp 2: FSDP shards its rows, Shard(1), and not whole experts.
    ParityCase(Layout(4, 2), "olmoe, 2 experts", accumulation=2, sync_each_batch=False, **SHORT),
    ParityCase(Layout(1, 0), "qwen3_moe, tied", **SHORT),
    # Into the second epoch.
    ParityCase(Layout(4, 2), "qwen3_moe, tied", num_steps=4, checkpointing="selective"),
    # Fewer examples than ranks and micro-steps: dummies, also in every rank of a micro-step.
    ParityCase(Layout(4, 4), num_steps=2, num_examples=3, aux_loss_coef=0.02),
    ParityCase(Layout(4, 2), num_steps=2, num_examples=3, accumulation=2, sync_each_batch=False),
    ParityCase(Layout(4, 2, "replicate"), num_steps=2, num_examples=3, accumulation=2),
    # Padded batches, and padding that counts in no loss.
    ParityCase(LAYOUTS[2], accumulation=2, packing="False", aux_loss_coef=0.02, **SHORT),
    # Tensor parallelism over ranks of one ep group, and of two; norms of a head; sinks and biases.
    ParityCase(
        Layout(4, 2, tp_size=2),
        "qwen3_moe",
        accumulation=2,
        sync_each_batch=False,
        placement="balanced",
        cpu_offload="params",
        **SHORT,
    ),
    ParityCase(Layout(4, 1, "replicate", tp_size=2), "gpt_oss", lora="attn-only", **SHORT),
    # No expert parallelism: all of one module over four ranks; by FSDP alone, and by shard_moe.
    ParityCase(Layout(4, 0), **SHORT),
    ParityCase(Layout(4, 1), **SHORT),
    ParityCase(Layout(1, 1), **SHORT),
    ParityCase(Layout(2, 2), kernel="eager", **SHORT),
    # Our Triton kernels, in the interpreter (FSDP1's case checkpoints and has adapters).
    ParityCase(
        Layout(2, 2),
        "mixtral, one layer",
        num_steps=2,
        num_examples=2,
        kernel="triton",
        checkpointing="selective",
    ),
]


@pytest.mark.parametrize(
    "case",
    [*(_case(*pair) for pair in PAIRS), *GROUPS, *SLICES, *SEQUENCES, *COMPOSED, *SPECIAL],
    ids=str,
)
def test_run_equals_one_stock_process(pools, parity_folder, case):
    wanted = parity_folder.reference(parity_folder.stock_run(case))
    seen = run_case(pools, parity_folder, case)
    distance = measure_distance(seen, wanted)
    assert distance.loss < BOUND, distance
    assert distance.grad_norm < BOUND, distance
    assert distance.first_gradient < BOUND, distance
    assert _weight_error(parity_folder, case, seen, distance) < BOUND, distance


def _weight_error(parity_folder, case, seen, distance):
    """Return how far the final weights are from stock in fp32, or else from stock in fp64.

    Adam divides a gradient by its own size. One of 1e-7 among others of 1e-3 is half noise, and so
    is then its weight: two fp32 runs, each 6e-6 from fp64, were 1.2e-5 apart (an adapter).
    """
    if distance.weight < BOUND:
        return distance.weight
    exact = parity_folder.reference(parity_folder.stock_run(case, "float64"))
    return measure_distance(seen, exact).weight


def test_reference_learns(parity_folder):
    """Parity with a run in which nothing happens would prove nothing."""
    case = ParityCase(LAYOUTS[0], num_steps=4)
    trace = parity_folder.reference(parity_folder.stock_run(case))
    assert trace.losses[-1] < 0.9 * trace.losses[0]
    assert min(trace.grad_norms) > 1.0  # so that the default clipping clips


def test_cases_hold_every_pair_of_options():
    for i, j in combinations(range(len(PAIRS[0])), 2):
        wanted = set(product({p[i] for p in PAIRS}, {p[j] for p in PAIRS}))
        assert {(pair[i], pair[j]) for pair in PAIRS} == wanted
