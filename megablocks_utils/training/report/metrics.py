"""Numbers of each optimizer step: measured on every rank, reduced once, one JSON line each."""

import json
import math
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megablocks_utils.training.report.evaluations import Evaluation, is_evaluation
from megablocks_utils.training.report.expert_load import StepLoads
from megablocks_utils.training.report.json_lines import JsonLinesWriter
from megablocks_utils.training.report.memory import read_memory

__all__ = ["MetricsWriter", "RunTotals", "StepMeter", "StepMetrics", "read_metrics"]


@dataclass(frozen=True)
class StepMetrics:
    """Hold the numbers of one optimizer step, the same on every rank.

    Attributes:
        step: Optimizer steps done, 1 after the first.
        epoch: Epochs done, as a fraction.
        loss: Sum of the global batch's token losses over its number of label tokens.
        grad_norm: Global L2 norm of the gradient before clipping.
        learning_rate: Rate used by this step.
        tokens: Label tokens of the global batch.
        input_tokens: Input tokens of the global batch.
        step_time_s: Wall time of the slowest rank.
        tokens_per_s: Input tokens of all ranks per second.
        mfu: Model FLOPs of the active parameters over the devices' dense bf16 peak; None on a CPU
            and on a device whose peak is not known.
        mem_peak_bytes: Peak memory since the run's start, largest over ranks.
        mem_alloc_bytes: Memory held after `zero_grad`, largest over ranks.
        aux_loss: Load-balancing loss before its coefficient, mean over the micro-batches of all
            ranks that gave one; None when none did.
        moe_load_max_over_mean: Tokens of the busiest expert over the mean of its layer's experts,
            in the worst layer; None in a step whose loads are not measured.
        loads: All that is measured of the experts' loads; it stands in a file of its own.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    input_tokens: int
    step_time_s: float
    tokens_per_s: float
    mem_peak_bytes: int
    mem_alloc_bytes: int
    mfu: float | None = None
    aux_loss: float | None = None
    moe_load_max_over_mean: float | None = None
    loads: StepLoads | None = field(default=None, compare=False, repr=False)

    def as_record(self) -> dict[str, Any]:
        """Return the step as it stands in `metrics.jsonl`.

        It has no key for what was not measured, but always that of `mfu`.
        """
        record = vars(self) | {"loads": None}
        return {n: value for n, value in record.items() if value is not None or n == "mfu"}


class StepMeter:
    """Measure one optimizer step after another on this rank.

    Loss parts are added up on the device, so nothing waits for the device between micro-batches.

    Args:
        device: Where this rank computes.
        group: Ranks of the run; None for all of them, or for a run without processes.
        num_copies: Ranks that have the same rows, whose losses count once.
        mfu_rate: `mfu` of one input token a second; None where it is not known.

    Attributes:
        num_nonfinite_weights: Of the last step: counts of `add_nonfinite_weights`, all ranks.
    """

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        *,
        num_copies: int = 1,
        mfu_rate: float | None = None,
    ) -> None:
        self._num_copies = num_copies
        self._device = device
        self._mfu_rate = mfu_rate
        self._group = group
        self.num_nonfinite_weights = 0
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._started_s: float | None = None

    def start_step(self) -> None:
        """Begin a step: start its clock and forget the last step's losses."""
        self._sums.zero_()
        self._started_s = time.perf_counter()

    def add_micro_batch(
        self, loss_sum: Tensor, aux: Tensor | None = None, aux_share: float = 1.0
    ) -> None:
        """Add a micro-batch of this rank, without waiting for the device.

        Args:
            loss_sum: Scalar, sum of the token losses, not divided by anything.
            aux: Scalar, load-balancing loss before its coefficient; None where the model gives
                none or the micro-batch is a dummy.
            aux_share: How much of a micro-batch's it is, where ranks share rows.
        """
        self._sums[0].add_(loss_sum.detach())
        if aux is not None:
            self._sums[1].add_(aux.detach())
            self._sums[2].add_(aux_share)

    def add_nonfinite_weights(self, count: Tensor) -> None:
        """Add how many weights of this rank are not finite, without waiting for the device."""
        self._sums[3].add_(count)

    def finish_step(
        self,
        step: int,
        epoch: float,
        *,
        num_label_tokens: int,
        num_input_tokens: int,
        grad_norm: float | Tensor,
        learning_rate: float,
        loads: StepLoads | None = None,
    ) -> StepMetrics:
        """End the step, after `optimizer.step()` and `zero_grad()`, and return its numbers.

        **Collective:** two all-reduces over the group (sums, then maxima); every rank must call.

        Args:
            step: Optimizer steps done, this one included.
            epoch: Epochs done, as a fraction.
            num_label_tokens: Label tokens of the global batch, all ranks.
            num_input_tokens: Input tokens of the global batch, all ranks.
            grad_norm: Global norm before clipping, already the same on every rank.
            learning_rate: Rate this step used.
            loads: Of the experts, the same on every rank; None where they are not measured.

        Raises:
            RuntimeError: `start_step` was not called for this step.
        """
        if self._started_s is None:
            raise RuntimeError("finish_step was called without start_step")
        loss_sum, aux_sum, num_aux, num_bad = self._reduce(self._sums, dist.ReduceOp.SUM)
        self.num_nonfinite_weights = int(num_bad)
        # Reading the sums waited for the device: only now is the step over.
        elapsed_s, self._started_s = time.perf_counter() - self._started_s, None
        memory = read_memory(self._device)
        own = [elapsed_s, memory.peak_bytes, memory.allocated_bytes]
        maxima = torch.tensor(own, dtype=torch.float64, device=self._device)
        step_time_s, peak_bytes, allocated_bytes = self._reduce(maxima, dist.ReduceOp.MAX)
        tokens_per_s = num_input_tokens / step_time_s
        return StepMetrics(
            step=step,
            epoch=epoch,
            loss=loss_sum / self._num_copies / num_label_tokens,
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            tokens=num_label_tokens,
            input_tokens=num_input_tokens,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            mfu=None if self._mfu_rate is None else self._mfu_rate * tokens_per_s,
            mem_peak_bytes=int(peak_bytes),
            mem_alloc_bytes=int(allocated_bytes),
            aux_loss=aux_sum / num_aux if num_aux else None,
            moe_load_max_over_mean=None if loads is None else loads.max_over_mean,
            loads=loads,
        )

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> list[float]:
        """Reduce `values` in place over the group and bring them to the host."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, op=operation, group=self._group)
        return values.tolist()


@dataclass(frozen=True)
class RunTotals:
    """Add up a run's steps; peaks are the largest over steps and ranks."""

    steps: int = 0
    tokens: int = 0
    input_tokens: int = 0
    mem_peak_bytes: int = 0
    mem_alloc_bytes: int = 0

    def plus(self, metrics: StepMetrics) -> "RunTotals":
        """Return the totals with one more step."""
        return replace(
            self,
            steps=self.steps + 1,
            tokens=self.tokens + metrics.tokens,
            input_tokens=self.input_tokens + metrics.input_tokens,
            mem_peak_bytes=max(self.mem_peak_bytes, metrics.mem_peak_bytes),
            mem_alloc_bytes=max(self.mem_alloc_bytes, metrics.mem_alloc_bytes),
        )


class MetricsWriter(JsonLinesWriter):
    """Write `metrics.jsonl`: one line a step or evaluation, on disk as it is over. Rank 0 only."""

    def write(self, metrics: StepMetrics | Evaluation) -> None:
        """Append one step or evaluation; a number that is not finite becomes null.

        Raises:
            OSError: The file cannot be written.
        """
        self.append([metrics.as_record()])


def read_metrics(path: str | Path) -> list[StepMetrics]:
    """Read the steps of `metrics.jsonl` back, with NaN where a number was not finite."""
    with Path(path).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [_parse(record) for record in records if not is_evaluation(record)]


def _parse(record: dict[str, Any]) -> StepMetrics:
    known: dict[str, Any] = {
        field.name: record[field.name] for field in fields(StepMetrics) if field.name in record
    }
    known |= {n: math.nan for n, value in known.items() if value is None and n != "mfu"}
    return StepMetrics(**known)
