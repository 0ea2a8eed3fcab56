"""The files that grow while a run trains: metrics, loads of experts, answers. Rank 0 only."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from megablocks_utils.files import (
    EXPERT_LOAD_NAME,
    METRICS_NAME,
    SAMPLES_NAME,
    SAMPLES_PAGE_NAME,
)
from megablocks_utils.training.report.evaluations import Evaluation
from megablocks_utils.training.report.expert_load import LoadWriter
from megablocks_utils.training.report.json_lines import JsonLinesWriter
from megablocks_utils.training.report.metrics import MetricsWriter, StepMetrics
from megablocks_utils.training.report.samples import Sample, read_samples, write_samples_page

__all__ = ["EarlierLogs", "RunLogs"]


@dataclass(frozen=True)
class EarlierLogs:
    """Hold the files of the steps done before; None for those that are not continued."""

    metrics: Path | None = None
    loads: Path | None = None
    samples: Path | None = None


class RunLogs:
    """Write each line as soon as it is known.

    Args:
        folder: the output folder.
        earlier: what a resumed run continues.
        has_loads: whether loads of experts are measured.
        has_samples: whether held-out prompts are answered.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(
        self, folder: Path, earlier: EarlierLogs, *, has_loads: bool, has_samples: bool
    ) -> None:
        self._samples_path = folder / SAMPLES_NAME
        self._open = ExitStack()
        metrics = MetricsWriter(folder / METRICS_NAME, after=earlier.metrics)
        self._metrics = self._open.enter_context(metrics)
        self._loads: LoadWriter | None = None
        self._samples: JsonLinesWriter | None = None
        if has_loads or earlier.loads is not None:
            loads = LoadWriter(folder / EXPERT_LOAD_NAME, after=earlier.loads)
            self._loads = self._open.enter_context(loads)
        if has_samples or earlier.samples is not None:
            samples = JsonLinesWriter(self._samples_path, after=earlier.samples)
            self._samples = self._open.enter_context(samples)

    def close(self) -> None:
        """Close the files; every line that could be written is in them."""
        self._open.close()

    @property
    def has_loads(self) -> bool:
        """Whether there is a file of loads."""
        return self._loads is not None

    @property
    def has_samples(self) -> bool:
        """Whether there is a file of answers."""
        return self._samples is not None

    def write(self, line: StepMetrics | Evaluation) -> None:
        """Append a step, with its loads where they were measured, or an evaluation.

        Raises:
            OSError: a file cannot be written.
        """
        self._metrics.write(line)
        loads = line.loads if isinstance(line, StepMetrics) else None
        if loads is not None and self._loads is not None:
            self._loads.write(loads)

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Append answers, and write the page of first and last ones again.

        Raises:
            OSError: a file cannot be written.
        """
        if self._samples is not None:
            self._samples.append([asdict(sample) for sample in samples])
            page = self._samples_path.with_name(SAMPLES_PAGE_NAME)
            write_samples_page(read_samples(self._samples_path), page)
