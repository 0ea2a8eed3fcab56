"""The layer benchmark counts work as the formulas do, and refuses contenders that are wrong."""

from dataclasses import replace

import pytest
import torch

from benchmarks.harness.contender import SkippedError
from benchmarks.harness.device_timing import Machine, time_runs
from benchmarks.harness.processes import single_process
from benchmarks.moe_layer.cases import (
    FROZEN,
    FULL,
    GPT_OSS,
    LORA16,
    LORA64,
    MIXTRAL,
    MODES,
    QWEN3,
    TINY,
    Case,
    order_cases,
)
from benchmarks.moe_layer.check import WrongError, check_contender, compute_expected
from benchmarks.moe_layer.contenders import (
    BASELINE,
    CONTENDERS,
    CPU_CONTENDERS,
    OURS,
    OURS_GROUPED_MM,
)
from benchmarks.moe_layer.floor import (
    H100,
    adapter_flops,
    forward_floor_s,
    forward_flops,
    least_saved_bytes,
    step_floor_s,
    step_flops,
)
from benchmarks.moe_layer.inputs import draw_inputs, draw_weights, route

CPU = torch.device("cpu")
TOKENS = 16384
GIB = 2**30


# --- the floor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "forward_ms", "full_ms", "lora_ms", "saved_gib"),
    [
        (MIXTRAL, 14.47, 43.4, 30.0, 1.88),
        (QWEN3, 1.55, 4.65, 3.66, 0.44),
        (GPT_OSS, 4.09, 12.26, 8.80, 0.79),
    ],
)
def test_floors_are_those_the_aims_were_set_by(shape, forward_ms, full_ms, lora_ms, saved_gib):
    """Figures of the study that the project began with; they are rounded to the last digit."""
    floors = [forward_floor_s(shape, TOKENS, H100)]
    floors += [step_floor_s(shape, TOKENS, mode, H100) for mode in (FULL, LORA16)]
    for floor, wanted in zip(floors, (forward_ms, full_ms, lora_ms), strict=True):
        assert 1e3 * floor == pytest.approx(wanted, rel=2e-3)
    assert least_saved_bytes(shape, TOKENS) / GIB == pytest.approx(saved_gib, abs=0.006)


def test_floor_of_a_stage_is_its_work_or_its_bytes_whichever_takes_longer():
    no_memory, no_arithmetic = Machine(1e12, 1e30), Machine(1e30, 1e12)
    assert step_floor_s(TINY, 8, FULL, no_memory) == pytest.approx(step_flops(TINY, 8, FULL) / 1e12)
    # By hand: T 8, N 16, H 64, F 96, 4 experts of 18432 weights; elements of two bytes.
    tokens, rows, narrow, wide, weights = 8 * 64, 16 * 64, 16 * 96, 2 * 16 * 96, 4 * 18432
    forward = 2 * tokens + 2 * rows + 2 * narrow + wide + weights
    inputs = 2 * tokens + 2 * rows + 3 * wide + weights
    of_weights = 2 * tokens + 2 * narrow + wide + weights
    seconds = [2 * elements / 1e12 for elements in (forward, inputs, of_weights)]
    assert forward_floor_s(TINY, 8, no_arithmetic) == pytest.approx(seconds[0])
    assert step_floor_s(TINY, 8, FROZEN, no_arithmetic) == pytest.approx(sum(seconds[:2]))
    assert step_floor_s(TINY, 8, FULL, no_arithmetic) == pytest.approx(sum(seconds))
    adapters = 2 * (2 * rows + wide + narrow) / 1e12
    assert step_floor_s(TINY, 8, LORA64, no_arithmetic) == pytest.approx(
        sum(seconds[:2]) + adapters
    )


def test_useful_work_is_6_12_and_18_times_rows_and_sizes():
    unit = TOKENS * 2 * 4096 * 14336
    assert forward_flops(MIXTRAL, TOKENS) == 6 * unit
    works = {mode.name: step_flops(MIXTRAL, TOKENS, mode) / unit for mode in MODES}
    assert works == {"lora16": 12, "full": 18, "frozen": 12, "lora64": 12}
    # Through A (H to r, F to r) and B (r to 2 F, r to H), three times: forward and both gradients.
    by_hand = 3 * 2 * TOKENS * 2 * 16 * (4096 + 2 * 14336 + 14336 + 4096)
    assert adapter_flops(MIXTRAL, TOKENS, LORA16) == by_hand
    assert adapter_flops(MIXTRAL, TOKENS, FULL) == 0


# --- cases -----------------------------------------------------------------------------------


def test_routings_are_even_skewed_and_worst():
    counts = {}
    for routing in ("uniform", "zipf", "all-to-one"):
        index = route(Case(TINY, FULL, routing, 4000), torch.Generator().manual_seed(0))
        assert index.shape == (4000, TINY.top_k)
        if routing != "all-to-one":
            assert (index[:, 0] != index[:, 1]).all()
        counts[routing] = index.reshape(-1).bincount(minlength=TINY.num_experts).tolist()
    assert all(1900 < count < 2100 for count in counts["uniform"])
    assert counts["zipf"] == sorted(counts["zipf"], reverse=True)
    assert counts["zipf"][0] > 1.5 * counts["zipf"][2]
    assert counts["all-to-one"] == [8000, 0, 0, 0]


def test_what_the_aims_are_about_is_measured_first():
    cases = list(order_cases((MIXTRAL, QWEN3), MODES, ("uniform", "zipf"), TOKENS))
    assert [(c.mode.name, c.shape.name) for c in cases[:3]] == [
        ("lora16", MIXTRAL.name),
        ("lora16", QWEN3.name),
        ("full", MIXTRAL.name),
    ]
    assert len(cases) == 16 and {c.routing for c in cases[:8]} == {"uniform"}


# --- the check -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """A right contender of a case with adapters and more tokens than the check's sample."""
    case = Case(TINY, LORA16, "zipf", 600)
    weights, inputs = draw_weights(case, CPU), draw_inputs(case, CPU)
    contender = CONTENDERS[OURS_GROUPED_MM](case, weights, inputs)
    return contender, compute_expected(case, weights, inputs)


@pytest.mark.parametrize("mode", [FULL, FROZEN, LORA64], ids=lambda mode: mode.name)
def test_every_contender_that_runs_here_is_right(mode):
    case = Case(TINY, mode, "uniform", 600)
    weights, inputs = draw_weights(case, CPU), draw_inputs(case, CPU)
    expected, checked = compute_expected(case, weights, inputs), []
    with single_process(CPU):
        for name, build in (CONTENDERS | {"the layer": CPU_CONTENDERS[OURS_GROUPED_MM]}).items():
            if name == OURS:  # minutes in Triton's interpreter; tests/kernels/fused has it
                continue
            try:
                used = check_contender(build(case, weights, inputs), expected)
            except SkippedError:
                continue
            assert max(used.values()) <= 1
            checked.append(name)
    assert {BASELINE, OURS_GROUPED_MM, "the layer"} <= set(checked)
    assert ("peft" in checked) == bool(mode.rank)
    assert ("transformers_eager" in checked) == (not mode.rank)


def spoil(contender, name, change):
    """Return the contender with one of its results changed."""
    return replace(contender, to_common={**contender.to_common, name: change})


def test_check_uses_less_than_its_bound_and_needs_every_result(drawn):
    contender, expected = drawn
    used = check_contender(contender, expected)
    assert list(used) == ["output", "tokens", "top_k_weights", *contender.trained]
    assert len(contender.trained) == 4 and 0 < max(used.values()) <= 1
    less = replace(contender, trained=dict(list(contender.trained.items())[:3]))
    with pytest.raises(WrongError, match=r"it has other results: \['down_proj.lora_B'\]"):
        check_contender(less, expected)


def test_check_names_the_wrong_tensor(drawn):
    contender, expected = drawn

    def drop_a_tile(gradient):
        spoiled = gradient.clone()
        spoiled[1, :, 16:32] = 0
        return spoiled

    for name, change, message in (
        ("output", lambda t: t * 1.02, r"output is off by 2\.\de-02, more than 1\.\de-02"),
        ("tokens", lambda t: t * 0.98, "the gradient of tokens is off by"),
        ("tokens", lambda t: t + 1e-3, "the gradient of tokens is not zero at tokens without one"),
        ("down_proj.lora_A", drop_a_tile, "the gradient of down_proj.lora_A is off by"),
        ("gate_up_proj.lora_B", lambda t: t * torch.nan, "gate_up_proj.lora_B is off by nan"),
    ):
        with pytest.raises(WrongError, match=message):
            check_contender(spoil(contender, name, change), expected)


def test_time_is_per_run_and_long_runs_are_fewer():
    seen = []
    assert len(time_runs(lambda: seen.append(1), CPU, repeats=20, warmups=3)) == 20
    assert len(seen) == 23
    assert len(time_runs(lambda: None, CPU, repeats=20, warmups=1, most_s=0.0)) == 10
