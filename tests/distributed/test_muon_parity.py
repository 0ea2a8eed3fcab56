"""Whole runs with Muon equal one process that gives every whole matrix to torch's own Muon.

Losses, gradient norms, every gradient of the first step and every final weight, in fp32.
"""

import pytest

from tests.support.parity import TWO_BATCHES, Layout, ParityCase, run_case
from tests.support.trace import measure_distance

BOUND = 1e-5  # relative; the contract's
# The iteration is in bfloat16: what differs by fp32's rounding may be rounded the other way there,
# also between stock in fp32 and in fp64, 1.4e-5 apart after two steps.
MAX_EXCESS = 4
SHORT = {"num_steps": 2, "num_examples": TWO_BATCHES, "weight_decay": 0.1, "optim": "muon"}

CASES = [
    # One expert a rank on dp 2: FSDP cuts rows of its matrices.
    ParityCase(Layout(4, 2), "olmoe, 2 experts", **SHORT),
    ParityCase(Layout(4, 1, groups=2), "qwen3_moe", **SHORT),
    ParityCase(Layout(4, 2, tp_size=2), placement="balanced", **SHORT),
    # Factors of adapters: whole ones beside slices.
    ParityCase(Layout(4, 1, expert_tp_size=2), "qwen3_moe", lora="mlp-only", **SHORT),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_equals_one_process_with_torchs_muon(pools, parity_folder, case):
    stock = parity_folder.reference(parity_folder.stock_run(case))
    exact = parity_folder.reference(parity_folder.stock_run(case, "float64"))
    seen = run_case(pools, parity_folder, case)
    distance = measure_distance(seen, stock)
    assert distance.loss < BOUND, distance
    assert distance.grad_norm < BOUND, distance
    assert distance.first_gradient < BOUND, distance
    own = measure_distance(stock, exact).weight
    found = measure_distance(seen, exact)
    assert found.weight < MAX_EXCESS * own, (found, own)
