"""A run resumes from a checkpoint as if it had never stopped, on whatever ranks and script."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import count

import pytest
import torch

from tests.support import resuming
from tests.support.parity import NUM_EXAMPLES, TWO_BATCHES, Layout
from tests.support.resuming import ResumedRun, Run, SavedRun, resume, run_and_save

BOUND = 1e-5  # relative; the contract's
SAVED_STEP = 2
NUM_STEPS = 4  # as many after the checkpoint as before it, and into the second epoch
MID_EPOCH, EPOCH_BOUNDARY = NUM_EXAMPLES, TWO_BATCHES
make_run = partial(
    resuming.make_run, saved_step=SAVED_STEP, num_steps=NUM_STEPS, num_examples=MID_EPOCH
)
IN_BACKGROUND = ("--async_save", "True")  # the save is held back until the next step is over

# Rows of experts are cut where there are fewer experts than ranks or odd sizes; FSDP1's flat shards
# cut within rows.
ONE = make_run("fsdp2", Layout(1, 0))
TWO = make_run("fsdp2", Layout(2, 2), *IN_BACKGROUND, model="qwen3_moe, tied", cpu_offload="params")
FOUR_TWO = make_run("fsdp2", Layout(4, 2), model="olmoe, 2 experts")
PLACED = {"placement": "balanced"}
FOUR_TWO_COPIES = make_run("fsdp2", Layout(4, 2, "replicate"), cpu_offload="optimizer", **PLACED)
FOUR_TWO_PLACED = make_run("fsdp2", Layout(4, 2), **PLACED)
FOUR = make_run("fsdp2", Layout(4, 4))
# In two groups that each hold the whole model.
FOUR_GROUPS = make_run("fsdp2", Layout(4, 2, groups=2))
FOUR_GROUPS_SHARDED = make_run("fsdp2", Layout(4, 1, groups=2))
# Each expert split, too.
FOUR_SLICES = make_run("fsdp2", Layout(4, 1, expert_tp_size=2))
# The dense layers split; half of the words is an odd number, which FSDP shards unevenly.
FOUR_TP = make_run("fsdp2", Layout(4, 2, tp_size=2), model="mixtral, odd half of the words")
FOUR_SEQUENCES = make_run("fsdp2", Layout(4, 4, sp_size=2))
ONE_FSDP1 = make_run("fsdp1", Layout(1, 0, "replicate"), model="mixtral, wide")
TWO_FSDP1 = make_run("fsdp1", Layout(2, 2, "replicate"), model="mixtral, wide")
FOUR_TWO_FSDP1 = make_run("fsdp1", Layout(4, 2, "replicate"), model="qwen3_moe", **PLACED)
FOUR_UNSHARDED_FSDP1 = make_run("fsdp1", Layout(4, 0, "replicate"), model="olmoe, 2 experts")
ADAPTERS = make_run("fsdp2", Layout(4, 2), model="qwen3_moe", lora="all", **PLACED)
ADAPTERS_FSDP1 = make_run("fsdp1", Layout(2, 2, "replicate"), *IN_BACKGROUND, lora="all")
# The same numbers on every layout, whatever a rank holds of a packed matrix.
PACKED = {"model": "mixtral, 6 experts", "lora": "mlp-only", "quantization": "nf4"}
PACKED_ROWS = make_run("fsdp2", Layout(4, 2), **PACKED)
PACKED_SLICES = make_run("fsdp1", Layout(4, 2, "replicate", expert_tp_size=2), **PACKED)
MUON = make_run("fsdp2", Layout(4, 2), optim="muon", **PLACED)

RESHARDS = [
    (MUON, FOUR_SLICES),
    (ONE, FOUR_TWO),
    (TWO, FOUR),
    (TWO, ONE_FSDP1),
    (FOUR_TWO_COPIES, FOUR_TWO_FSDP1),
    (FOUR, FOUR_GROUPS_SHARDED),
    (FOUR_GROUPS, ONE),
    (TWO_FSDP1, FOUR_TWO_PLACED),
    (FOUR_TP, FOUR_SEQUENCES),
    (TWO_FSDP1, FOUR_SLICES),
    (FOUR_SLICES, FOUR_TWO_FSDP1),
    (FOUR_TWO_COPIES, TWO),
    (FOUR_UNSHARDED_FSDP1, FOUR_TWO),
    (ADAPTERS, TWO_FSDP1),
    (ADAPTERS_FSDP1, TWO),
    (PACKED_ROWS, PACKED_SLICES),
]
SAME_LAYOUT = [
    TWO,
    FOUR_TWO,
    FOUR_TWO_COPIES,
    ADAPTERS,
    ADAPTERS_FSDP1,
    *(
        make_run(
            script,
            Layout(2, 2, "replicate"),
            precision=precision,
            accumulation=2,
            sync_each_batch=False,
            checkpointing=checkpointing,
            num_examples=num_examples,
            cpu_offload="optimizer" if precision == "bf16_sr" else "none",
        )
        for script, precision, checkpointing, num_examples in (
            ("fsdp2", "bf16_sr", "False", MID_EPOCH),
            ("fsdp2", "mixed", "True", EPOCH_BOUNDARY),
            ("fsdp1", "bf16_sr", "False", EPOCH_BOUNDARY),
            ("fsdp1", "mixed", "selective", MID_EPOCH),
        )
    ),
]


@pytest.fixture(scope="module")
def save(pools, parity_folder, tmp_path_factory) -> Callable[..., SavedRun]:
    """Runs that have saved, each made once."""
    numbers = count()

    @cache
    def run_once(run: Run) -> SavedRun:
        folder = tmp_path_factory.mktemp("saved") / str(next(numbers))
        return run_and_save(pools, parity_folder, run, folder)

    return run_once


@pytest.fixture
def go_on(pools, parity_folder, tmp_path) -> Callable[[SavedRun, Run], ResumedRun]:
    """Go on from a saved run as another, having checked that its state is exactly the saved one."""

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


def check_close(resumed: ResumedRun, saved: SavedRun) -> None:
    """Compare a run with the uninterrupted one in another layout, whose sums are rounded apart."""
    assert [line[:3] for line in series(resumed)] == [line[:3] for line in series(saved)]
    for ours, wanted in zip(resumed.metrics, saved.metrics, strict=True):
        assert ours.loss == pytest.approx(wanted.loss, rel=BOUND)
        assert ours.grad_norm == pytest.approx(wanted.grad_norm, rel=BOUND)


@pytest.mark.parametrize(
    ("source", "target"), RESHARDS, ids=lambda run: f"{run.script} {run.layout} {run.case.lora}"
)
def test_another_layout_goes_on(save, go_on, source, target):
    check_close(go_on(save(source), source.on(target)), save(source))


@pytest.mark.parametrize("run", SAME_LAYOUT, ids=str)
def test_same_layout_goes_on_bit_by_bit(save, go_on, run):
    saved = save(run)
    resumed = go_on(saved, run)
    assert series(resumed) == series(saved)
    assert resumed.random_states == saved.random_states
    if run.case.lora != "none":
        assert all(".lora_" in name for name in saved.state)  # the frozen weights are not kept


def test_run_may_be_made_longer(save, go_on):
    whole = make_run("fsdp2", Layout(2, 2), "--lr_scheduler_type", "constant")
    short = replace(whole, case=replace(whole.case, num_steps=SAVED_STEP))
    resumed = go_on(save(short), whole)
    assert series(resumed) == series(save(whole))
