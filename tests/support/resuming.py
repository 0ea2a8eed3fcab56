"""Runs that save checkpoints, and runs that resume from them, on the pools of ranks.

Both scripts' own path, watched from outside: what every rank holds at the moment of saving and
right after restoring is put together here on its own, so that nothing is compared with itself.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from megablocks_utils.checkpoint.snapshot import write_checkpoint
from megablocks_utils.checkpoint.tensor_shards import TensorShard
from megablocks_utils.training.checkpointer import Checkpointer
from megablocks_utils.training.loop import fit
from megablocks_utils.training.recorder import RunRecorder
from megablocks_utils.training.report.metrics import StepMetrics, read_metrics
from megablocks_utils.training.resume.random_states import capture_random_states
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.trainer import MoETrainer
from tests.support.fsdp1_run import build_setup_and_arguments
from tests.support.parity import Layout, ParityCase, ParityFolder, build_run
from tests.support.rank_pool import RankPool

SAVED_STEP = 3
NUM_STEPS = 8
MID_EPOCH = 53  # examples: three full global batches and one of five, so step 3 is within an epoch
EPOCH_BOUNDARY = 37  # an epoch of three steps

Shards = dict[str, TensorShard]


@dataclass(frozen=True)
class Run:
    """A script, what it trains, and when that is saved.

    `options` are words of the command line besides the case's.
    """

    script: str
    case: ParityCase
    options: tuple[str, ...] = ()
    saved_step: int = SAVED_STEP

    def __str__(self) -> str:
        return " ".join([self.script, str(self.case), *self.options])

    @property
    def layout(self) -> Layout:
        """Ranks and what is done with the experts."""
        return self.case.layout

    def on(self, other: "Run") -> "Run":
        """Return the same training, on the script, layout, memory and placement of another run."""
        names = ("layout", "cpu_offload", "placement")
        place = {name: getattr(other.case, name) for name in names}
        return replace(self, script=other.script, case=replace(self.case, **place))


def make_run(
    script: str, layout: Layout, *options: str, saved_step: int = SAVED_STEP, **case: Any
) -> Run:
    """Return a run, of eight steps if not told; `case` are fields of `ParityCase`."""
    settings = {"num_steps": NUM_STEPS, "num_examples": MID_EPOCH, "checkpointing": "False"}
    return Run(script, ParityCase(layout, **settings | case), options, saved_step)


@dataclass
class Watched:
    """What one rank held when a run's step was saved and when a resumed run began."""

    saved: Shards = field(default_factory=dict)
    restored: Shards = field(default_factory=dict)
    random_states: bytes = b""  # at the same moment


@dataclass(frozen=True)
class SavedRun:
    """A run that was saved after its `saved_step` and trained on.

    Attributes:
        run: what ran.
        folder: its output.
        state: whole tensors at the moment of saving, by name.
        metrics: of all its steps.
        random_states: of each rank at the moment of saving.
    """

    run: Run
    folder: Path
    state: dict[str, Tensor]
    metrics: list[StepMetrics]
    random_states: list[bytes]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the saved step."""
        return self.folder / f"checkpoint-{self.run.saved_step}"


@dataclass(frozen=True)
class ResumedRun:
    """A run that has gone on from another's checkpoint: as `SavedRun`, its state when it began."""

    state: dict[str, Tensor]
    metrics: list[StepMetrics]
    random_states: list[bytes]


def run_and_save(
    pools: Mapping[int, RankPool], models: ParityFolder, run: Run, folder: Path, *options: str
) -> SavedRun:
    """Train all steps, saving every `saved_step` of them."""
    words = ["--save_strategy", "steps", "--save_steps", str(run.saved_step), *options]
    watched = _train(pools, models, run, folder, *words)
    state = assemble([rank.saved for rank in watched], run)
    random_states = [rank.random_states for rank in watched]
    return SavedRun(run, folder, state, read_metrics(folder / "metrics.jsonl"), random_states)


def resume(
    pools: Mapping[int, RankPool], models: ParityFolder, run: Run, checkpoint: Path, folder: Path
) -> ResumedRun:
    """Go on from a checkpoint to the last step."""
    watched = _train(pools, models, run, folder, "--resume_from_checkpoint", str(checkpoint))
    state = assemble([rank.restored for rank in watched], run)
    random_states = [rank.random_states for rank in watched]
    return ResumedRun(state, read_metrics(folder / "metrics.jsonl"), random_states)


def assemble(ranks: Sequence[Shards], run: Run) -> dict[str, Tensor]:
    """Put together whole tensors from what every rank holds.

    Checks that every element is there as often as the layout says, and equal each time.
    """
    wholes = {}
    for name in sorted({name for shards in ranks for name in shards}):
        shards = [shards[name] for shards in ranks if name in shards]
        assert {shard.whole_shape for shard in shards} == {shards[0].whole_shape}, name
        blocks: dict[tuple, list[Tensor]] = {}
        for shard in shards:
            for block in shard.blocks:
                key = block.offsets, tuple(block.tensor.shape)
                blocks.setdefault(key, []).append(block.tensor)
        wholes[name] = _put_together(name, shards[0].whole_shape, blocks)
        if name.endswith(".step"):  # held by every rank that holds any of the parameter
            continue
        wanted = {num_copies(name, run)}
        # What tp or expert_tp does not split, each of its ranks has.
        wanted |= {n * _num_beside(name, run.layout) for n in wanted}
        if len(blocks) == 1:  # perhaps whole on every rank: a buffer, what stays in float32
            wanted.add(run.layout.world_size)
        assert {len(held) for held in blocks.values()} <= wanted, name
    return wholes


def num_copies(name: str, run: Run) -> int:
    """Return how many ranks hold the same part of a tensor."""
    layout = run.layout
    is_copied = ".experts." in name and layout.expert_dp == "replicate" and layout.ep_size
    of_part = layout.ep_size * layout.expert_tp_size
    return layout.world_size // of_part if is_copied else layout.groups


def _num_beside(name: str, layout: Layout) -> int:
    return layout.expert_tp_size if ".experts." in name else layout.tp_size


def _put_together(
    name: str, shape: tuple[int, ...], blocks: Mapping[tuple, list[Tensor]]
) -> Tensor:
    dtype = next(iter(blocks.values()))[0].dtype
    whole, times = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.int32)
    for (offsets, sizes), held in blocks.items():
        assert all(torch.equal(held[0], other) for other in held), name
        window = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        whole[window] = held[0]
        times[window] += 1
    assert (times == 1).all(), f"{name}: held {times.unique().tolist()} times"
    return whole


def _train(
    pools: Mapping[int, RankPool], models: ParityFolder, run: Run, folder: Path, *words: str
) -> list[Watched]:
    argv = [*models.argv(run.case), *run.options, *words, "--output_dir", str(folder)]
    train = {"fsdp2": train_fsdp2, "fsdp1": train_fsdp1}[run.script]
    return pools[run.layout.world_size].run(train, argv, run.saved_step, timeout=240)


def train_fsdp2(rank: int, argv: list[str], saved_step: int) -> Watched:
    """Run the FSDP2 script's path with its checkpoints, without the final model."""
    setup, state = build_run(argv)
    watched = Watched()
    if setup.resume is not None:
        watched.restored = _copy(state.run_state())
        watched.random_states = capture_random_states()
    recorder = RunRecorder(setup)
    checkpointer = _WatchingCheckpointer(setup, recorder.metrics_path)
    with recorder, checkpointer.watching(watched, saved_step):
        for metrics in fit(state, setup, checkpointer):
            recorder.record(metrics)
    return watched


def train_fsdp1(rank: int, argv: list[str], saved_step: int) -> Watched:
    """Run the FSDP1 script's path with its checkpoints, without the final model."""
    setup, arguments = build_setup_and_arguments(argv)
    watched = Watched()
    recorder = RunRecorder(setup)
    checkpointer = _WatchingCheckpointer(setup, recorder.metrics_path)
    trainer = MoETrainer(setup, arguments, on_step=recorder.record, hooks=checkpointer)
    if setup.resume is not None:
        trainer.add_callback(_AtTheBeginning(trainer, watched))
    with recorder, checkpointer.watching(watched, saved_step):
        trainer.train()
    return watched


class _WatchingCheckpointer(Checkpointer):
    """Keep what this rank held at the saved step; let its background save wait for the next.

    So whatever the save does not own has changed by the time it is written.
    """

    def watching(self, watched: Watched, saved_step: int) -> "_WatchingCheckpointer":
        self._watched, self._saved_step = watched, saved_step
        self._is_next_step_over = threading.Event()
        return self

    def after_step(self, step: int, state: RunState) -> None:
        if step == self._saved_step:
            torch.rand(1)  # nothing else draws: without this, there would be nothing to restore
            self._watched.saved = _copy(state)
            self._watched.random_states = capture_random_states()
        elif step > self._saved_step:
            self._is_next_step_over.set()
        with mock.patch("megablocks_utils.training.checkpointer.write_checkpoint", self._write):
            super().after_step(step, state)

    def _write(self, *args: Any, **kwargs: Any) -> Path:
        if threading.current_thread() is not threading.main_thread():
            assert self._is_next_step_over.wait(timeout=60)
        return write_checkpoint(*args, **kwargs)


class _AtTheBeginning(TrainerCallback):
    """Keep what this rank holds before the first step, all of it restored."""

    def __init__(self, trainer: MoETrainer, watched: Watched) -> None:
        self._trainer, self._watched = trainer, watched

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._watched.restored = _copy(self._trainer.run_state())
        self._watched.random_states = capture_random_states()


def _copy(state: RunState) -> Shards:
    return {name: shard.copied_to_cpu() for name, shard in state.shards().items()}
