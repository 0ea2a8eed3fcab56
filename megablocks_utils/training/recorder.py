"""What a run shows and leaves behind: summaries, progress, metrics, the model, `run.json`."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megablocks_utils.checkpoint.snapshot import not_written
from megablocks_utils.errors import UserError
from megablocks_utils.files import (
    ADAPTER_WEIGHTS_NAME,
    DISK_FAULTS,
    EXPERT_LOAD_NAME,
    EXPERT_LOAD_PLOT_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    RUN_RECORD_NAME,
    SAMPLES_PAGE_NAME,
)
from megablocks_utils.fsdp.fsdp2 import NamedTensors
from megablocks_utils.mesh.device_mesh import EP_AXIS
from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.output_claim import OutputClaim, claim_output_dir
from megablocks_utils.training.adapter_check import (
    AdapterCheck,
    AdapterReport,
)
from megablocks_utils.training.disk_errors import disk_errors_as_sentence
from megablocks_utils.training.final_record import build_final_record
from megablocks_utils.training.final_weights import write_adapter, write_model
from megablocks_utils.training.report.evaluations import Evaluation
from megablocks_utils.training.report.load_summary import report_loads
from megablocks_utils.training.report.loss_plot import plot_loss
from megablocks_utils.training.report.memory import describe_memory_source
from megablocks_utils.training.report.metrics import RunTotals, StepMetrics, read_metrics
from megablocks_utils.training.report.progress import track_training
from megablocks_utils.training.report.run_logs import EarlierLogs, RunLogs
from megablocks_utils.training.report.run_record import write_run_json
from megablocks_utils.training.report.samples import Sample, describe_sample
from megablocks_utils.training.report.summary import (
    RunResult,
    describe_evaluation,
    show_end_summary,
    show_start_summary,
)
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.start_facts import (
    collect_facts,
    list_start_lines,
)
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
        self._logs: RunLogs | None = None
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
        for line in list_start_lines(setup, self.output_dir):
            setup.console.print(line, markup=False, soft_wrap=True)
        raise_on_all_ranks(self._open_logs)
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
        if self._logs is not None:
            with self._as_sentence(self.metrics_path):
                self._logs.write(metrics)
            self._tracking.record(metrics)
            self._show(metrics)

    def record_evaluation(self, evaluation: Evaluation) -> None:
        """Take a measurement of the held-out examples.

        Raises:
            CheckpointError: on rank 0, if it cannot be written.
        """
        if self._logs is not None:
            with self._as_sentence(self.metrics_path):
                self._logs.write(evaluation)
            self._tracking.record_evaluation(evaluation.step, evaluation.as_record())
            self._show.evaluated(evaluation.eval_loss)
        self._setup.console.print(evaluation.describe(), markup=False, soft_wrap=True)

    def record_samples(self, samples: Sequence[Sample]) -> None:
        """Take the answers to held-out prompts.

        Raises:
            CheckpointError: on rank 0, if they cannot be written.
        """
        for sample in samples:
            self._setup.console.print(describe_sample(sample), markup=False, soft_wrap=True)
        if self._logs is not None:
            with self._as_sentence(self.output_dir / SAMPLES_PAGE_NAME):
                self._logs.write_samples(samples)
            self._tracking.record_samples(samples)

    def _open_logs(self) -> None:
        if not self._is_main:
            return
        config, resume = self._setup.config, self._setup.resume
        earlier = EarlierLogs()
        if resume is not None:
            earlier = EarlierLogs(resume.metrics_path, resume.loads_path, resume.samples_path)
        with self._as_sentence(self.metrics_path):
            self._logs = RunLogs(
                self.output_dir,
                earlier,
                has_loads=config.expert_load_steps > 0,
                has_samples=config.evaluation.predict_samples > 0,
            )
        self._open.callback(self._logs.close)

    def _add(self, metrics: StepMetrics) -> None:
        self._totals = self._totals.plus(metrics)
        self._losses.append(metrics.loss)
        self._has_learned |= metrics.learning_rate > 0

    def finish(
        self,
        state: RunState,
        tensors: NamedTensors,
        kernel_check: KernelCheck | None,
        evaluation: dict[str, Any] | None = None,
    ) -> None:
        """Write the final model or adapter, the plot and `run.json`; show the end summary.

        **Collective:** every rank must call; `tensors` gathers.

        Args:
            state: of the run, trained.
            tensors: (name, whole tensor or None) of every parameter, or with adapters of every
                trainable one; not begun yet.
            kernel_check: what was found before the first step.
            evaluation: what the evaluations have come to; None without any.

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
        record = build_final_record(
            setup,
            kernel_check,
            adapter_report,
            train_runtime_s=self._runtime_s,
            totals=self._totals,
            plan=plan,
            evaluation=evaluation,
        )
        with self._as_sentence(self.output_dir / LOSS_PLOT_NAME):
            plot_loss(self.metrics_path, self.output_dir / LOSS_PLOT_NAME)
        expert_load = self._report_loads()
        with self._as_sentence(self.output_dir / RUN_RECORD_NAME):
            write_run_json(self.output_dir / RUN_RECORD_NAME, record)
        first_loss, final_loss = self._losses[0], self._losses[-1]
        self._tracking.finish(record, first_loss=first_loss, final_loss=final_loss)
        result = self._result(kernel_check, adapter_report, expert_load, evaluation)
        show_end_summary(setup.console, result)

    def _report_loads(self) -> str | None:
        """Draw the loads of experts, where any were measured, and say what they have cost."""
        if self._logs is None or not self._logs.has_loads:
            return None
        with self._as_sentence(self.output_dir / EXPERT_LOAD_PLOT_NAME):
            ep_size = self._setup.placement.axis_sizes[EP_AXIS]
            return report_loads(self.output_dir, ep_size, self._setup.plan.imbalance)

    def _as_sentence(self, path: Path) -> AbstractContextManager[None]:
        return disk_errors_as_sentence(path, self.output_dir)

    def _result(
        self,
        kernel_check: KernelCheck | None,
        adapter_report: AdapterReport | None,
        expert_load: str | None,
        evaluation: dict[str, Any] | None,
    ) -> RunResult:
        loads = () if expert_load is None else ((EXPERT_LOAD_NAME, "the loads of experts"),)
        page = (SAMPLES_PAGE_NAME, "answers to held-out prompts, first and last")
        samples = (page,) if self._logs is not None and self._logs.has_samples else ()
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
            evaluation=None if evaluation is None else describe_evaluation(evaluation),
            output_dir=str(self.output_dir),
            files=(
                (weights, "the trained weights, with configuration and tokenizer"),
                (LOSS_PLOT_NAME, "the loss of each step"),
                (METRICS_NAME, "every step's numbers"),
                *loads,
                *samples,
                (RUN_RECORD_NAME, "what ran, on what"),
            ),
        )
