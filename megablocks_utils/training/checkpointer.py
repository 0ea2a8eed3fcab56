"""Save checkpoints while a run trains, in both loops: when due, or when it is to stop."""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from megablocks_utils.checkpoint.companions import write_companions
from megablocks_utils.checkpoint.run_manifest import BASE_FOLDER_KEY, COMPATIBILITY_KEY, STREAM_KEY
from megablocks_utils.checkpoint.snapshot import Snapshot, write_checkpoint
from megablocks_utils.checkpoint.tensor_shards import TensorShard
from megablocks_utils.config.secrets import redact_record
from megablocks_utils.errors import CheckpointError, NonFiniteError
from megablocks_utils.files import EXPERT_LOAD_NAME, SAMPLES_NAME
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.interruption import StopRequest
from megablocks_utils.processes.output_folder import CHECKPOINT_PREFIX
from megablocks_utils.processes.progress_marks import PROGRESS
from megablocks_utils.processes.time_limit import TimeLimit
from megablocks_utils.training.report.evaluations import find_best, read_evaluations
from megablocks_utils.training.report.run_record import read_versions
from megablocks_utils.training.resume.random_states import capture_random_states
from megablocks_utils.training.resume.resume_point import rank_file_name
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step_hooks import StepHooks
from megablocks_utils.training.value_checks import check_before_saving

__all__ = ["Checkpointer"]


class Checkpointer(StepHooks):
    """Save as `--save_strategy` asks, and when a signal or `--time_limit` stops the run.

    Use it as a context around the training loop: on leaving it, a save in the background is over.

    Args:
        setup: the run.
        metrics_path: where the run's `metrics.jsonl` is.

    Attributes:
        is_interrupted: whether the loop was stopped before its last step.
    """

    def __init__(self, setup: Setup, metrics_path: Path) -> None:
        self.is_interrupted = False
        self._setup = setup
        self._metrics_path = metrics_path
        self._is_first = setup.launch.rank == 0
        self._output_dir = Path(setup.config.output_dir)
        self._saved_step = setup.resume.step if setup.resume else 0
        self._stop = StopRequest()
        limit = setup.config.saving.time_limit
        self._time_limit = None if limit is None else TimeLimit(limit)
        self._is_size_known, self._is_step_start = False, True
        self._background = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=partial(_use_device, setup.device)
        )
        self._pending: Future[Path] | None = None
        self._open = ExitStack()
        self._started_s = 0.0

    def __enter__(self) -> Self:
        """Listen for signals.

        **Collective:** every rank must enter: a process group for saving is made.
        """
        # Its own, so that a save in the background never mixes with the run's collectives.
        self._group = dist.new_group(backend="gloo")
        self._open.enter_context(self._stop)
        self._started_s = time.perf_counter()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        PROGRESS.begin("writing what it has learned")
        try:
            # All ranks have met values that are not finite, so all finish the save of a good step.
            if error_type is None or issubclass(error_type, NonFiniteError):
                self._finish_pending()
        finally:
            # Not waiting: after an error, other ranks may never enter the save's collectives.
            self._background.shutdown(wait=False)
            self._open.close()

    def should_stop(self) -> bool:
        """Return whether a signal has asked some rank to stop, or the time of one is nearly up."""
        PROGRESS.begin_micro_batch()
        limit, num_saves = self._time_limit, 1 if self._pending is None else 2
        is_time_up = limit is not None and limit.is_nearly_up(num_saves=num_saves)
        is_step_start, self._is_step_start = self._is_step_start, False
        return self._stop.on_any_rank(is_time_up=is_time_up, is_step_start=is_step_start)

    def after_step(self, step: int, state: RunState) -> None:
        """Save if a checkpoint is due."""
        self._is_step_start = True
        PROGRESS.finish_step(step)
        schedule = self._setup.schedule
        if self._setup.config.saving.is_due(
            step, num_steps=schedule.num_steps, steps_per_epoch=schedule.steps_per_epoch
        ):
            with PROGRESS.within(f"saving {CHECKPOINT_PREFIX}{step}"):
                self._save(step, state)
        if self._time_limit is not None:
            if not self._is_size_known:
                self._time_limit.expect_save(_count_bytes(state.shards()))
                self._is_size_known = True
            self._time_limit.end_step()

    def after_stop(self, step: int, state: RunState) -> None:
        """Save the run as it is, unless that is saved already."""
        self.is_interrupted = True
        PROGRESS.begin("saving before it stops")
        if step != self._saved_step:
            self._save(step, state)
        self._finish_pending()
        console = self._setup.console
        console.print(
            f"Stopped by {self._stop.name} after step {step} of {self._setup.schedule.num_steps}; "
            + (
                "resume with --resume_from_checkpoint True"
                if step
                else "no step was done, so there is nothing to save"
            ),
            markup=False,
        )

    def _save(self, step: int, state: RunState) -> None:
        self._finish_pending()
        config = self._setup.config.saving
        started_s = time.perf_counter()
        shards = state.shards()
        if config.async_save:
            shards = {name: shard.copied_to_cpu() for name, shard in shards.items()}
        logs = raise_on_all_ranks(self._read_logs)
        write_all = partial(
            write_checkpoint,
            self._take_snapshot(step, shards, logs),
            self._output_dir,
            group=self._group,
            total_limit=config.save_total_limit,
            choose_best=self._choose_best,
        )
        write = partial(self._check_and_write, step, shards, write_all)
        if config.async_save:
            self._pending = self._background.submit(write)
        else:
            write()
        self._saved_step = step
        stall_s = time.perf_counter() - started_s
        self._setup.console.print(f"checkpoint-{step}: training waited {stall_s:.2f} s")

    def _check_and_write(
        self, step: int, shards: Mapping[str, TensorShard], write: Callable[[], Path]
    ) -> Path:
        """Write a checkpoint, unless its values are not finite: then no older one is removed."""
        started_s = time.perf_counter()
        place = f"{CHECKPOINT_PREFIX}{step} is not written"
        check_before_saving(self._setup, shards, place, self._group)
        folder = write()
        if self._time_limit is not None:
            self._time_limit.add_save(time.perf_counter() - started_s)
        return folder

    def _finish_pending(self) -> None:
        """Wait for the save in the background, and raise its error if it had one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _take_snapshot(
        self, step: int, shards: Mapping[str, TensorShard], logs: Mapping[str, bytes]
    ) -> Snapshot:
        setup = self._setup
        model = setup.model

        def write_shared(folder: Path) -> None:
            for name, content in logs.items():
                (folder / name).write_bytes(content)
            write_companions(
                model.config,
                model.generation_config,
                setup.tokenizer,
                getattr(torch, setup.precision.weights),
                folder,
                base=setup.model_folder if _has_all_layers(setup) else None,
            )

        return Snapshot(
            step=step,
            shards=shards,
            rank_files={rank_file_name(setup.launch.rank): capture_random_states()},
            write_shared=write_shared,
            contents=self._describe(step) if self._is_first else {},
        )

    def _read_logs(self) -> dict[str, bytes]:
        """Return metrics, loads and samples so far by file name, on rank 0, which writes them."""
        if not self._is_first:
            return {}
        others = [self._metrics_path.with_name(name) for name in (EXPERT_LOAD_NAME, SAMPLES_NAME)]
        paths = [self._metrics_path, *(path for path in others if path.exists())]
        try:
            return {path.name: path.read_bytes() for path in paths}
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error

    def _choose_best(self, steps: Collection[int]) -> int | None:
        """Return which of the saved steps no limit removes; None: any may go."""
        if not self._setup.config.evaluation.needs_best:
            return None
        best = find_best(read_evaluations(self._metrics_path), steps)
        return None if best is None else best.step

    def _describe(self, step: int) -> dict[str, Any]:
        """Return what the manifest holds besides its files."""
        setup = self._setup
        parallel = setup.config.parallel
        position = setup.schedule.position_after(step)
        before_s = setup.resume.manifest["train_runtime_s"] if setup.resume else 0.0
        return {
            "step": step,
            "world_size": setup.launch.world_size,
            "mesh": setup.placement.axis_sizes,
            "expert_dp": parallel.expert_dp if setup.sharded else None,
            "entry_point": setup.config.entry_point,
            "versions": read_versions(),
            BASE_FOLDER_KEY: _describe_base(setup),
            "options": redact_record(asdict(setup.config)),
            COMPATIBILITY_KEY: setup.compatibility.as_record(),
            **({} if position is None else {STREAM_KEY: position.as_record()}),
            "train_runtime_s": before_s + time.perf_counter() - self._started_s,
        }


def _use_device(device: torch.device) -> None:
    """Give a new thread this process's GPU: CUDA gives it number 0, on which it takes memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _describe_base(setup: Setup) -> dict[str, str | int]:
    """Say where the base is, for a later export, and how many tensors that will copy of it."""
    unused = setup.reader.layout.unused if _has_all_layers(setup) else ()
    return {"folder": str(setup.model_folder.resolve()), "num_passed_through": len(unused)}


def _has_all_layers(setup: Setup) -> bool:
    return setup.config.model.truncate_layers is None


def _count_bytes(shards: Mapping[str, TensorShard]) -> int:
    return sum(block.tensor.nbytes for shard in shards.values() for block in shard.blocks)
