"""A run goes on from a checkpoint as if it had never stopped, on whatever ranks and script."""

from collections.abc import Callable
from functools import cache
from itertools import count

import pytest
import torch

from tests.support.parity import Layout
from tests.support.resuming import (
    EPOCH_BOUNDARY,
    NUM_STEPS,
    SAVED_STEP,
    ResumedRun,
    Run,
    SavedRun,
    make_run,
    resume,
    run_and_save,
)

BOUND = 1e-5  # relative; the contract's

ONE = make_run("fsdp2", Layout(1, 0))
TWO = make_run("fsdp2", Layout(2, 2))
FOUR_TWO = make_run("fsdp2", Layout(4, 2))
FOUR_TWO_COPIES = make_run("fsdp2", Layout(4, 2, "replicate"))
FOUR = make_run("fsdp2", Layout(4, 4))
ONE_FSDP1 = make_run("fsdp1", Layout(1, 0, "replicate"))
TWO_FSDP1 = make_run("fsdp1", Layout(2, 2, "replicate"))
FOUR_TWO_FSDP1 = make_run("fsdp1", Layout(4, 2, "replicate"))
FOUR_UNSHARDED_FSDP1 = make_run("fsdp1", Layout(4, 0, "replicate"))

RESHARDS = [
    (ONE, FOUR_TWO),
    (ONE, FOUR_UNSHARDED_FSDP1),
    (TWO, FOUR),
    (TWO, ONE_FSDP1),
    (FOUR_TWO, FOUR_TWO_COPIES),
    (FOUR_TWO, TWO_FSDP1),
    (FOUR_TWO_COPIES, TWO),
    (FOUR_TWO_COPIES, FOUR_TWO_FSDP1),
    (FOUR, ONE),
    (FOUR, FOUR_TWO_FSDP1),
    (ONE_FSDP1, FOUR_UNSHARDED_FSDP1),
    (TWO_FSDP1, FOUR_TWO),
    (FOUR_TWO_FSDP1, FOUR),
    (FOUR_TWO_FSDP1, TWO_FSDP1),
    (FOUR_UNSHARDED_FSDP1, FOUR_TWO_COPIES),
    (FOUR_UNSHARDED_FSDP1, FOUR_TWO_FSDP1),
]


@pytest.fixture(scope="module")
def save(pools, parity_folder, tmp_path_factory) -> Callable[..., SavedRun]:
    """Runs that have saved, each made once."""
    numbers = count()

    @cache
    def run_once(run: Run, *options: str) -> SavedRun:
        folder = tmp_path_factory.mktemp("saved") / str(next(numbers))
        return run_and_save(pools, parity_folder, run, folder, *options)

    return run_once


@pytest.fixture
def go_on(pools, parity_folder, tmp_path) -> Callable[[SavedRun, Run], ResumedRun]:
    """Go on from a saved run as another, having checked that the state is the saved one, exactly."""

    def resume_and_check(saved: SavedRun, run: Run) -> ResumedRun:
        resumed = resume(pools, parity_folder, run, saved.checkpoint, tmp_path / "resumed")
        assert resumed.state.keys() == saved.state.keys()
        for name, wanted in saved.state.items():
            assert resumed.state[name].dtype == wanted.dtype, name
            assert torch.equal(resumed.state[name], wanted), name
        assert [step.step for step in resumed.metrics] == list(range(1, NUM_STEPS + 1))
        assert resumed.metrics[:SAVED_STEP] == saved.metrics[:SAVED_STEP]
        return resumed

    return resume_and_check


def series(run: SavedRun | ResumedRun) -> list[tuple[float, ...]]:
    """Return what a step says of the training itself, of every step."""
    return [
        (step.epoch, step.learning_rate, step.tokens, step.loss, step.grad_norm)
        for step in run.metrics
    ]


@pytest.mark.parametrize(("source", "target"), RESHARDS, ids=lambda run: f"{run.script} {run.layout}")
def test_another_layout_goes_on(save, go_on, source, target):
    saved = save(source)
    resumed = go_on(saved, source.on(target))
    assert [line[:3] for line in series(resumed)] == [line[:3] for line in series(saved)]
    for ours, wanted in zip(resumed.metrics, saved.metrics, strict=True):
        assert ours.loss == pytest.approx(wanted.loss, rel=BOUND)
        assert ours.grad_norm == pytest.approx(wanted.grad_norm, rel=BOUND)
