"""The LoRA benchmark counts bytes as a hand does, and refuses results that differ."""

import pytest
import torch

from benchmarks.expert_lora.__main__ import measure_agreement
from benchmarks.expert_lora.adapters import OURS, PEFT, RANK
from benchmarks.expert_lora.layer import build_layers
from benchmarks.harness.case import LayerShape
from benchmarks.harness.memory import measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.processes import single_process
from benchmarks.harness.timing import compare, take_turns

CPU = torch.device("cpu")
FLOAT, INT64, INT32 = 4, 8, 4
SHAPE = LayerShape("tiny", 64, 96, num_experts=4, top_k=2)
TOKENS = 24
ROWS = TOKENS * SHAPE.top_k
# All tensors of the layer that the backward pass reads, by hand; H hidden, I intermediate.
ACTIVATIONS = (
    FLOAT
    * ROWS
    * (
        SHAPE.hidden_size  # rows in expert order
        + 2 * SHAPE.intermediate_size  # gate and up
        + SHAPE.intermediate_size  # what the gate makes of them
        + SHAPE.hidden_size  # results of the experts, for the gradient of the routing weights
    )
)
# What passes between A and B of both adapters, two indices, where each expert's rows end.
OUR_EXTRAS = 2 * FLOAT * ROWS * RANK + 2 * INT64 * ROWS + INT32 * SHAPE.num_experts
WEIGHTS = SHAPE.experts_bytes
# The activation of the gate, three indices and the routing weights in expert order, and where each
# expert's rows end.
PEFT_EXTRAS = (FLOAT * SHAPE.intermediate_size + 3 * INT64 + FLOAT) * ROWS
PEFT_EXTRAS += INT32 * SHAPE.num_experts


@pytest.fixture(scope="module")
def layers():
    with single_process(CPU):
        yield build_layers(SHAPE, TOKENS, "grouped_mm", CPU)


def test_saved_bytes_of_a_known_graph():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(5, 10, requires_grad=True)

    def forward():
        inner = x @ weight  # saves x and weight, both constants
        first, second = inner.exp().chunk(2)  # saves its result, 200 bytes
        return first[:2] * second  # saves two views of that same result

    assert measure_saved_bytes(forward, [weight, x]) == 200
    assert measure_saved_bytes(forward, [x]) == 200 + 400
    with torch.no_grad():
        assert measure_saved_bytes(forward, []) == 0


def test_peak_of_known_steps():
    leaf, upstream = torch.randn(1000, requires_grad=True), torch.ones(1000)

    def take_and_release():
        first, second = torch.empty(3000), torch.empty(500)
        del first
        return second, torch.empty(250)

    def exponential():
        leaf.exp().backward(upstream)

    assert measure_peak_bytes(take_and_release, CPU) == 12000 + 2000
    # The result, and the gradient that the leaf keeps.
    assert measure_peak_bytes(exponential, CPU) == 4000 + 4000


def test_our_layer_saves_activations_and_peft_all_weights_too(layers):
    saved = {n: measure_saved_bytes(c.forward, c.constants) for n, c in layers.items()}
    assert saved[OURS] == ACTIVATIONS + OUR_EXTRAS
    assert saved[PEFT] == ACTIVATIONS + WEIGHTS + PEFT_EXTRAS


def test_peak_is_the_same_each_time_and_not_below_what_is_saved(layers):
    peaks = {name: {_peak(one) for _ in range(3)} for name, one in layers.items()}
    assert len(peaks[OURS]) == len(peaks[PEFT]) == 1
    assert peaks[OURS].pop() > ACTIVATIONS
    assert peaks[PEFT].pop() > ACTIVATIONS + WEIGHTS


def test_a_step_starts_from_no_gradients(layers):
    for one in layers.values():
        first = {name: tensor.clone() for name, tensor in one.results().items()}
        assert max(measure_agreement(one.results(), first).values()) == 0.0


def _peak(one):
    one.step()
    return measure_peak_bytes(one.step, CPU)


def test_agreement_names_what_differs():
    wanted = {"output": torch.ones(4), "B": torch.full((4,), 2.0)}
    assert measure_agreement(wanted, wanted) == {"output": 0.0, "B": 0.0}
    assert measure_agreement(wanted | {"B": wanted["B"] * (1 + 5e-6)}, wanted)["B"] < 1e-5
    for ours, theirs, message in (
        (wanted | {"B": wanted["B"] * 1.5}, wanted, "the results differ in B by 5.0e-01"),
        (wanted | {"B": wanted["B"] * torch.nan}, wanted, "the results differ in B by nan"),
        ({"output": wanted["output"]}, wanted, "only one contender has ['B']"),
        (wanted, wanted | {"B": torch.zeros(4)}, "B is zero, so its agreement would prove nothing"),
    ):
        with pytest.raises(RuntimeError) as caught:
            measure_agreement(ours, theirs)
        assert str(caught.value) == message


def test_contenders_take_turns_and_ratios_compare_turns_of_one_round():
    seen = []
    steps = {name: (lambda name=name: seen.append(name)) for name in (OURS, PEFT)}
    times, num_steps = take_turns(steps, CPU, rounds=3, least_turn_s=0.0)
    assert num_steps == 1
    assert seen[4:] == [OURS, PEFT, PEFT, OURS, OURS, PEFT]
    assert [len(values) for values in times["wall_s"].values()] == [3, 3]
    known = {OURS: [1.0, 2.0, 4.0], PEFT: [3.0, 2.0, 8.0]}
    summary = compare({"wall_s": known, "cpu_s": known}, OURS, PEFT)
    assert summary["ratio"] == {"n": 3, "median": 2.0, "min": 1.0, "max": 3.0}
    assert summary["ratio_of_cpu_time"] == summary["ratio"]
    assert summary["wall_s"][PEFT] == {"n": 3, "median": 3.0, "min": 2.0, "max": 8.0}
