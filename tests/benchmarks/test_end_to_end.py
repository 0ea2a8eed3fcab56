"""The systems of the end-to-end benchmark train the same thing, and its summary adds up."""

from dataclasses import replace

import pytest

from benchmarks.end_to_end import drive
from benchmarks.end_to_end.cases import build_systems, count_tokens
from benchmarks.end_to_end.contenders import PADDED, train_other
from benchmarks.end_to_end.measure import DifferentError, check_same, summarise
from benchmarks.end_to_end.settings import Case
from benchmarks.end_to_end.systems import StepTaken, System, SystemEndedError, SystemSpec
from benchmarks.harness.workload import Workload, save_workload

TINY = Workload(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_experts=4,
    vocab_size=64,
    num_examples=64,
    longest_tokens=40,
    global_batch=8,
    per_device_batch=2,
)

NUM_STEPS = 2


class AllTakenError(Exception):
    """All steps that were wanted are taken."""


class Gate(drive.Gate):
    """A gate that opens for some steps, and keeps the answers."""

    def __init__(self, num_steps):
        self.left, self.losses, self.counts = num_steps, [], []
        self._tokens = drive.TokenCount(TINY.vocab_size)

    def wait(self):
        if not self.left:
            self._tokens.stop()
            raise AllTakenError
        self._tokens.start()

    def answer(self, loss_share):
        self.left -= 1
        self.losses.append(loss_share)
        self.counts.append(self._tokens.take())


def train_all(rank, specs):
    found = {}
    for spec in specs:
        gate = Gate(NUM_STEPS)
        with pytest.raises(AllTakenError):
            if spec.kind == drive.SCRIPT:
                drive.train_script(list(spec.argv), gate)
            else:
                train_other(spec.kind, spec.argv, gate)
        found[spec.name] = gate.losses, gate.counts
    return found


def merge(ranks):
    """Return the steps of all ranks together, by name of the system."""
    return {
        name: [
            StepTaken(sum(losses), 1.0, 1.0, [1], [sum(one) for one in zip(*counts, strict=True)])
            for losses, counts in zip(
                zip(*(rank[name][0] for rank in ranks), strict=True),
                zip(*(rank[name][1] for rank in ranks), strict=True),
                strict=True,
            )
        ]
        for name in ranks[0]
    }


@pytest.mark.parametrize("use_lora", ["none", "all"])
def test_systems_see_the_same_tokens_and_compute_the_same_losses(ranks2, tmp_path, use_lora):
    save_workload(TINY, tmp_path)
    case = Case(2, 2, use_lora=use_lora, gradient_checkpointing="True")
    specs = build_systems(case, TINY, tmp_path, None, max_steps=NUM_STEPS + 1)
    if use_lora == "none":
        specs.append(replace(specs[-1], name="padded", kind=PADDED))
    steps = merge(ranks2.run(train_all, specs))
    assert len(steps) == (5 if use_lora == "none" else 3)
    check_same(specs, steps, 1e-5)
    ours = steps[specs[0].name]
    tokens = count_tokens(specs[0].argv, case.world_size)
    assert [sum(step.tokens) for step in ours] == tokens[:NUM_STEPS]
    assert len({step.loss for step in ours}) == NUM_STEPS


def test_what_differs_is_named():
    specs = [SystemSpec("ours", []), SystemSpec("other", [])]

    def steps(*losses, tokens=(2, 1)):
        return [StepTaken(loss, 1.0, 1.0, [1], list(tokens)) for loss in losses]

    same = {"ours": steps(4.0, 3.9), "other": steps(4.0, 3.9)}
    assert len(check_same(specs, same, 1e-5)) == 64
    with pytest.raises(DifferentError) as caught:
        check_same(specs, same | {"other": steps(4.0, 3.91)}, 1e-5)
    assert str(caught.value) == (
        "step 2: the loss of other is 3.91, that of ours 3.9; they may differ by 1e-05"
    )
    later = [specs[0], replace(specs[1], compares_later_steps=False)]
    check_same(later, same | {"other": steps(4.0, 3.91)}, 1e-5)
    with pytest.raises(DifferentError, match="step 1: the loss"):
        check_same(later, same | {"other": steps(float("nan"), 3.9)}, 1e-5)
    with pytest.raises(DifferentError) as caught:
        check_same(specs, same | {"other": steps(4.0, 3.9, tokens=(1, 2))}, 1e-5)
    assert str(caught.value) == "step 1: other has other tokens than ours: 3 and 3 of them"


def test_a_system_that_ends_says_why(tmp_path):
    """Its script comes from another tree, which holds nothing."""
    spec = SystemSpec("broken", ["--none"], tree=tmp_path)
    (tmp_path / "logs").mkdir()
    with (
        System(spec, 1, 8, tmp_path / "logs") as system,
        pytest.raises(SystemEndedError) as caught,
    ):
        system.wait_until_ready()
    assert "broken: rank 0 ended: ModuleNotFoundError: No module named" in str(caught.value)


def test_summary_compares_turns_of_the_same_round():
    times = {"ours": [1.0, 2.0, 2.0], "other": [2.0, 2.0, 5.0]}
    result = {"wall_s": times, "cpu_s": times, "peak_bytes": {"ours": [10], "other": [15]}}
    summary = summarise(result, [10, 20, 20], "ours")
    assert summary["tokens_per_s"]["ours"] == {"n": 3, "median": 10.0, "min": 10.0, "max": 10.0}
    other = {"n": 3, "median": 2.0, "min": 1.0, "max": 2.5}
    assert summary["ratio"]["other"] == summary["ratio_of_cpu_time"]["other"] == other
    assert summary["ratio_of_peak"]["other"]["median"] == 1.5
