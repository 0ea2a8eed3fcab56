"""What a run shows and leaves behind: summaries, progress, metrics, the model, `run.json`."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from megablocks_utils.checkpoint.snapshot import describe_kept, not_written
from megablocks_utils.errors import CheckpointError, UserError
from megablocks_utils.files import (
    ADAPTER_WEIGHTS_NAME,
    DISK_FAULTS,
    EXPERT_LOAD_NAME,
    EXPERT_LOAD_PLOT_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    RUN_RECORD_NAME,
)
from megablocks_utils.fsdp.fsdp2 import NamedTensors
from megablocks_utils.fsdp.placement_plan import describe_plan
from megablocks_utils.mesh.device_mesh import EP_AXIS
from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.output_claim import OutputClaim, claim_output_dir
from megablocks_utils.processes.output_folder import find_incomplete
from megablocks_utils.training.adapter_check import (
    AdapterCheck,
    AdapterReport,
)
from megablocks_utils.training.final_weights import write_adapter, write_model
from megablocks_utils.training.report.expert_load import LoadWriter
from megablocks_utils.training.report.load_summary import report_loads
from megablocks_utils.training.report.loss_plot import plot_loss
from megablocks_utils.training.report.memory import describe_memory_source
from megablocks_utils.training.report.metrics import (
    MetricsWriter,
    RunTotals,
    StepMetrics,
    read_metrics,
)
from megablocks_utils.training.report.progress import track_training
from megablocks_utils.training.report.run_record import build_run_record, write_run_json
from megablocks_utils.training.report.summary import (
    RunResult,
    show_end_summary,
    show_start_summary,
)
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.start_facts import (
    collect_facts,
    describe_kernel,
    describe_resolved,
)
from megablocks_utils.training.step.debug import describe_placements
from megablocks_utils.training.tracking import Tracking


class RunRecorder:
    """Show and write what happens, on rank 0; the other ranks only keep totals.

    Use it as a context around the training loop and, when that has come to its end, `finish`: in
    it this run alone has the output folder.

    Args:
        setup: the run; its model must be wrapped by the time the context is entered.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._is_main = setup.launch.rank == 0
        self._totals = RunTotals()
        self._losses: list[float] = []
        self._load_writer: LoadWriter | None = None
        self._has_learned = False
        self._open = ExitStack()
        self._started_s = 0.0
        self._runtime_s = 0.0
        self._claim: OutputClaim | None = None
        self._tracking = Tracking(setup)
        self.output_dir = Path(setup.config.output_dir)
        if setup.resume is not None:
            self._runtime_s = setup.resume.manifest["train_runtime_s"]
            for metrics in read_metrics(setup.resume.metrics_path):
                self._add(metrics)

    def __enter__(self) -> Self:
        """Claim the output folder, show the start-up summary, start the clock.

        **Collective:** every rank must enter; all raise what rank 0 raises.
        """
        self._claim = claim_output_dir(self._setup.config)
        try:
            self._start()
        except UserError as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start(self) -> None:
        setup = self._setup
        show_start_summary(setup.console, collect_facts(setup))
        if setup.lora is not None:
            setup.console.print(setup.lora.describe(), markup=False, soft_wrap=True)
        for path in find_incomplete(self.output_dir):
            line = f"{path.name} was never finished; it is left alone"
            setup.console.print(line, markup=False, soft_wrap=True)
        if setup.answer_end is not None and setup.answer_end.warning is not None:
            line = f"warning: {setup.answer_end.warning}"
            setup.console.print(line, markup=False, soft_wrap=True)
        if setup.config.debug:
            for line in (*describe_plan(setup.placement), *describe_placements(setup.model)):
                setup.console.print(line, markup=False, soft_wrap=True)
        raise_on_all_ranks(self._open_metrics)
        self._tracking.start()
        progress = track_training(setup.console, setup.schedule.num_steps, setup.first_step)
        self._show = self._open.enter_context(progress)
        self._started_s = time.perf_counter()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._open.close()
            self._tracking.close(error)
        finally:
            if self._claim is not None:
                self._claim.release(is_done=error is None)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            path = Path(error.filename or self.output_dir)
            raise not_written(path, error, self.output_dir) from error

    @property
    def metrics_path(self) -> Path:
        """Where the metrics of each step go."""
        return self.output_dir / METRICS_NAME

    def record(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step that is over.

        Raises:
            CheckpointError: on rank 0, if they cannot be written.
        """
        self._add(metrics)
        if self._claim is not None:
            self._claim.check()
        if self._is_main:
            with self._as_sentence(self.metrics_path):
                self._writer.write(metrics)
                if metrics.loads is not None and self._load_writer is not None:
                    self._load_writer.write(metrics.loads)
            self._tracking.record(metrics)
            self._show(metrics)

    def _open_metrics(self) -> None:
        if not self._is_main:
            return
        resume = self._setup.resume
        with self._as_sentence(self.metrics_path):
            done = None if resume is None else resume.metrics_path
            writer = MetricsWriter(self.metrics_path, after=done)
        self._writer = self._open.enter_context(writer)
        done = None if resume is None else resume.loads_path
        if self._setup.config.expert_load_steps or done is not None:
            path = self.output_dir / EXPERT_LOAD_NAME
            with self._as_sentence(path):
                self._load_writer = self._open.enter_context(LoadWriter(path, after=done))

    def _add(self, metrics: StepMetrics) -> None:
        self._totals = self._totals.plus(metrics)
        self._losses.append(metrics.loss)
        self._has_learned |= metrics.learning_rate > 0

    def finish(
        self, state: RunState, tensors: NamedTensors, kernel_check: KernelCheck | None
    ) -> None:
        """Write the final model or adapter, the plot and `run.json`; show the end summary.

        **Collective:** every rank must call; `tensors` gathers.

        Args:
            state: of the run, trained.
            tensors: (name, whole tensor or None) of every parameter, or with adapters of every
                trainable one; not begun yet.
            kernel_check: what was found before the first step.

        Raises:
            CheckpointError: on rank 0, if something cannot be written.
            AdapterCheckError: on rank 0, for an adapter that was not written as it was trained.
        """
        setup, adapter_check = self._setup, None
        self._runtime_s += time.perf_counter() - self._started_s
        self._open.close()
        # Before the adapter is checked: the check leaves weights gathered and memory freed.
        plan = setup.plan.as_record(state.model, state.optimizer, self._totals)
        with self._as_sentence(self.output_dir):
            if setup.lora is None:
                write_model(setup, state, tensors)
            else:
                has_learned = self._has_learned
                adapter_check = AdapterCheck(setup, setup.lora, state, has_learned=has_learned)
                write_adapter(setup, setup.lora, tensors, adapter_check)
        if not self._is_main:
            return
        adapter_report = None if adapter_check is None else adapter_check.report
        with self._as_sentence(self.output_dir / LOSS_PLOT_NAME):
            plot_loss(self.metrics_path, self.output_dir / LOSS_PLOT_NAME)
        expert_load = self._report_loads()
        kernel, reason = describe_kernel(setup)
        record = build_run_record(
            sys.argv,
            setup.config,
            resolved=describe_resolved(setup),
            mesh=setup.placement.axis_sizes,
            kernel=kernel,
            kernel_reason=reason,
            kernel_probe=None if kernel_check is None else kernel_check.as_record(),
            parameters=setup.counts,
            train_runtime_s=self._runtime_s,
            totals=self._totals,
            device=setup.device,
            adapter_check=None if adapter_report is None else adapter_report.as_record(),
            plan=plan,
            answer_end=None if setup.answer_end is None else setup.answer_end.as_record(),
        )
        with self._as_sentence(self.output_dir / RUN_RECORD_NAME):
            write_run_json(self.output_dir / RUN_RECORD_NAME, record)
        first_loss, final_loss = self._losses[0], self._losses[-1]
        self._tracking.finish(record, first_loss=first_loss, final_loss=final_loss)
        show_end_summary(setup.console, self._result(kernel_check, adapter_report, expert_load))

    def _report_loads(self) -> str | None:
        """Draw the loads of experts, where any were measured, and say what they have cost."""
        if self._load_writer is None:
            return None
        with self._as_sentence(self.output_dir / EXPERT_LOAD_PLOT_NAME):
            ep_size = self._setup.placement.axis_sizes[EP_AXIS]
            return report_loads(self.output_dir, ep_size, self._setup.plan.imbalance)

    @contextmanager
    def _as_sentence(self, path: Path) -> Iterator[None]:
        """Turn a full disk, or a folder that has vanished, into an error that a user can act on."""
        try:
            yield
        except OSError as error:
            raise not_written(path, error, self.output_dir) from error
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            raise CheckpointError(f"{error}; {describe_kept(self.output_dir)}") from error

    def _result(
        self,
        kernel_check: KernelCheck | None,
        adapter_report: AdapterReport | None,
        expert_load: str | None,
    ) -> RunResult:
        loads = () if expert_load is None else ((EXPERT_LOAD_NAME, "the loads of experts"),)
        weights = ADAPTER_WEIGHTS_NAME if self._setup.config.adapter.has_lora else "model"
        return RunResult(
            totals=self._totals,
            first_loss=self._losses[0],
            final_loss=self._losses[-1],
            train_runtime_s=self._runtime_s,
            memory_source=describe_memory_source(self._setup.device),
            kernel_check=None if kernel_check is None else kernel_check.describe(),
            adapter_check=None if adapter_report is None else adapter_report.describe(),
            expert_load=expert_load,
            output_dir=str(self.output_dir),
            files=(
                (weights, "the trained weights, with configuration and tokenizer"),
                (LOSS_PLOT_NAME, "the loss of each step"),
                (METRICS_NAME, "every step's numbers"),
                *loads,
                (RUN_RECORD_NAME, "what ran, on what"),
            ),
        )
