"""Whole FSDP1 runs under Trainer equal one process of stock transformers.

The same cases, reference and bounds as FSDP2's, on the layouts that FSDP1 has.
"""

import pytest

from tests.support.fsdp1_run import train_fsdp1
from tests.support.parity import TWO_BATCHES, Layout, ParityCase, run_case
from tests.support.trace import measure_distance, measure_drift

BOUND = 1e-5  # relative; the contract's
SHORT = {"num_steps": 2, "num_examples": TWO_BATCHES}  # the second batch is smaller

TWO = Layout(2, 2, "replicate")
FOUR_TWO = Layout(4, 2, "replicate")
FOUR = Layout(4, 4, "replicate")

CASES = [
    ParityCase(
        TWO,
        "qwen3_moe",
        accumulation=2,
        checkpointing="selective",
        cpu_offload="optimizer",
        **SHORT,
    ),
    ParityCase(TWO, "olmoe", accumulation=2, sync_each_batch=False, max_grad_norm=0.0, **SHORT),
    ParityCase(FOUR_TWO, "mixtral", accumulation=2, aux_loss_coef=0.02, **SHORT),
    ParityCase(FOUR_TWO, "qwen3_moe", checkpointing="False", weight_decay=0.1, **SHORT),
    ParityCase(
        FOUR_TWO,
        "olmoe",
        accumulation=2,
        sync_each_batch=False,
        placement="balanced",
        **SHORT,
    ),
    ParityCase(FOUR, "mixtral", checkpointing="selective", aux_loss_coef=0.02, **SHORT),
    # Into the second epoch.
    ParityCase(FOUR, "qwen3_moe, tied", num_steps=4, accumulation=2, sync_each_batch=False),
    # Padded batches, and padding that counts in no loss.
    ParityCase(TWO, "olmoe", accumulation=2, packing="False", aux_loss_coef=0.02, **SHORT),
    # No expert parallelism: by FSDP1 alone, and by shard_moe with whole copies.
    ParityCase(Layout(1, 0, "replicate"), "olmoe", **SHORT),
    ParityCase(Layout(4, 0, "replicate"), "mixtral", accumulation=2, **SHORT),
    ParityCase(Layout(4, 1, "replicate"), "mixtral", **SHORT),
    # Fewer examples than ranks and micro-steps: dummies, also in every rank of a micro-step.
    ParityCase(FOUR_TWO, num_steps=2, num_examples=3, accumulation=2, aux_loss_coef=0.02),
    # Rows that ranks share.
    ParityCase(Layout(4, 2, "replicate", sp_size=2), "gpt_oss", aux_loss_coef=0.02, **SHORT),
    # Adapters, which have their own units.
    ParityCase(FOUR_TWO, "qwen3_moe", lora="attn-only", checkpointing="selective", **SHORT),
    ParityCase(
        FOUR,
        "olmoe",
        lora="attn-only",
        checkpointing="False",
        accumulation=2,
        sync_each_batch=False,
        **SHORT,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_equals_one_stock_process(pools, parity_folder, case):
    wanted = parity_folder.reference(parity_folder.stock_run(case))
    seen = run_case(pools, parity_folder, case, train_fsdp1)
    distance = measure_distance(seen, wanted)
    assert distance.loss < BOUND, distance
    assert distance.grad_norm < BOUND, distance
    assert distance.first_gradient < BOUND, distance
    if distance.weight >= BOUND:  # see FSDP2's test: then fp32 itself is that far from fp64
        exact = parity_folder.reference(parity_folder.stock_run(case, "float64"))
        distance = measure_distance(seen, exact)
    assert distance.weight < BOUND, distance


# Of stock bf16's own drift from fp32, as for FSDP2.
PRECISION_BOUNDS = {"bf16": 2.0, "mixed": 0.5, "bf16_sr": 0.5}
LOW_PRECISION = 0.01  # less, and nothing was computed in bf16
PRECISION_STEPS = 8  # enough for what pure bf16 loses to show: 0.27 and 0.22 seen, at six 0.7


@pytest.mark.parametrize(
    ("layout", "precision"),
    [(TWO, "mixed"), (TWO, "bf16"), (FOUR_TWO, "bf16_sr")],
    ids=str,
)
def test_drift_is_bounded_by_stock_bf16(pools, parity_folder, layout, precision):
    case = ParityCase(layout, "qwen3_moe", PRECISION_STEPS, precision=precision)
    ours, stock = _drifts(pools, parity_folder, case)
    assert LOW_PRECISION * stock < ours < PRECISION_BOUNDS[precision] * stock


def test_drift_with_adapters(pools, parity_folder):
    """The frozen base is bf16 in both; only the adapters differ."""
    case = ParityCase(
        TWO,
        "mixtral",
        num_steps=4,
        precision="bf16_sr",
        lora="all",
        accumulation=2,
        sync_each_batch=False,
        checkpointing="selective",
    )
    ours, stock = _drifts(pools, parity_folder, case)
    assert LOW_PRECISION * stock < ours < 2 * stock


def _drifts(pools, parity_folder, case):
    """Return the drift of a case and that of one stock process in bf16, from stock fp32."""
    wanted = parity_folder.reference(parity_folder.stock_run(case))
    stock = parity_folder.reference(parity_folder.stock_run(case, "bfloat16"))
    seen = run_case(pools, parity_folder, case, train_fsdp1)
    return measure_drift(seen, wanted), measure_drift(stock, wanted)
