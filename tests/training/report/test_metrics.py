"""Numbers of a step: summed over micro-batches and ranks, written one line a step."""

import json
import math
import time
from unittest import mock

import pytest
import torch

from megablocks_utils.training.report import metrics as metrics_module
from megablocks_utils.training.report.memory import MemoryReading
from megablocks_utils.training.report.metrics import (
    MetricsWriter,
    RunTotals,
    StepMeter,
    StepMetrics,
    read_metrics,
)

CONTRACT_KEYS = [
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "input_tokens",
    "step_time_s",
    "tokens_per_s",
    "mem_peak_bytes",
    "mem_alloc_bytes",
    "mfu",
]
CPU = torch.device("cpu")


def build_metrics(step=1, loss=2.5, **changes):
    numbers = {
        "epoch": 0.5,
        "grad_norm": 1.25,
        "learning_rate": 5e-5,
        "tokens": 10,
        "input_tokens": 30,
        "step_time_s": 0.5,
        "tokens_per_s": 60.0,
        "mem_peak_bytes": 200,
        "mem_alloc_bytes": 100,
    }
    return StepMetrics(step=step, loss=loss, **(numbers | changes))


def finish(meter, **changes):
    numbers = {
        "num_label_tokens": 8,
        "num_input_tokens": 40,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
    }
    return meter.finish_step(3, 0.25, **(numbers | changes))


class TestStepMeter:
    def test_sums_micro_batches_and_divides_once(self):
        meter = StepMeter(CPU)
        meter.start_step()
        meter.add_micro_batch(torch.tensor(6.0), torch.tensor(1.0))
        meter.add_micro_batch(torch.tensor(2.0), torch.tensor(2.0))
        meter.add_micro_batch(torch.tensor(0.0))  # a dummy
        metrics = finish(meter, grad_norm=torch.tensor(1.5))
        assert (metrics.step, metrics.epoch, metrics.loss) == (3, 0.25, 1.0)
        assert (metrics.tokens, metrics.input_tokens) == (8, 40)
        assert (metrics.grad_norm, metrics.learning_rate) == (1.5, 1e-4)
        assert metrics.aux_loss == 1.5  # the dummy does not dilute the mean
        assert metrics.mfu is None
        meter = StepMeter(CPU, mfu_rate=1e-3)
        meter.start_step()
        metrics = finish(meter)
        assert metrics.mfu == pytest.approx(1e-3 * metrics.tokens_per_s)

    def test_forgets_the_step_before(self):
        meter = StepMeter(CPU)
        for loss_sum in (100.0, 4.0):
            meter.start_step()
            meter.add_micro_batch(torch.tensor(loss_sum))
            metrics = finish(meter)
        assert metrics.loss == 0.5
        assert metrics.aux_loss is None

    def test_small_parts_are_not_lost_beside_a_large_one(self):
        meter = StepMeter(CPU)
        meter.start_step()
        meter.add_micro_batch(torch.tensor(2.0**24))
        for _ in range(8):  # each would round away in fp32
            meter.add_micro_batch(torch.tensor(0.5))
        assert finish(meter, num_label_tokens=1).loss == 2.0**24 + 4

    def test_keeps_no_graph(self):
        weight = torch.ones((), requires_grad=True)
        meter = StepMeter(CPU)
        meter.start_step()
        meter.add_micro_batch(weight * 4, weight * 2)
        assert not meter._sums.requires_grad
        assert finish(meter).loss == 0.5

    def test_step_time_and_rate_belong_together(self):
        meter = StepMeter(CPU)
        started = time.perf_counter()
        meter.start_step()
        time.sleep(0.05)
        metrics = finish(meter)
        elapsed_s = time.perf_counter() - started
        assert 0.05 <= metrics.step_time_s <= elapsed_s
        assert metrics.tokens_per_s == 40 / metrics.step_time_s

    def test_step_must_be_started(self):
        meter = StepMeter(CPU)
        meter.start_step()
        finish(meter)
        with pytest.raises(RuntimeError, match="^finish_step was called without start_step$"):
            finish(meter)


def measure_on_rank(rank, folder):
    """Rank 1 is slower, fuller at its peak and emptier after it; only rank 0 has an aux loss."""
    meter = StepMeter(CPU)
    meter.start_step()
    meter.add_micro_batch(torch.tensor(3.0 + rank), torch.tensor(0.5) if rank == 0 else None)
    meter.add_micro_batch(torch.tensor(10.0 * rank))
    time.sleep(0.2 * rank)
    memory = MemoryReading(2**40 + 1, 50) if rank else MemoryReading(900, 70)
    with mock.patch.object(metrics_module, "read_memory", return_value=memory):
        metrics = finish(meter, num_label_tokens=4)
    with MetricsWriter(f"{folder}/{rank}.jsonl") as writer:
        writer.write(metrics)


def test_two_ranks_get_the_same_sums_and_maxima(ranks2, tmp_path):
    ranks2.run(measure_on_rank, str(tmp_path))
    ranks = [read_metrics(tmp_path / f"{rank}.jsonl") for rank in range(2)]
    assert ranks[0] == ranks[1]
    (metrics,) = ranks[0]
    assert metrics.loss == (3 + 4 + 10) / 4
    assert metrics.aux_loss == 0.5
    assert (metrics.mem_peak_bytes, metrics.mem_alloc_bytes) == (2**40 + 1, 70)
    assert metrics.step_time_s >= 0.2
    assert metrics.tokens_per_s == 40 / metrics.step_time_s


class TestMetricsWriter:
    def test_keys_are_the_contracts_in_its_order(self, tmp_path):
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            writer.write(build_metrics())
            writer.write(build_metrics(2, aux_loss=1.5))
        first, second = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
        assert list(first) == CONTRACT_KEYS
        assert list(second) == [*CONTRACT_KEYS, "aux_loss"]
        assert list(first.values()) == [
            *(1, 0.5, 2.5, 1.25, 5e-5, 10, 30, 0.5, 60.0, 200, 100),
            None,
        ]

    def test_a_line_is_there_at_once(self, tmp_path):
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            for step in (1, 2):
                writer.write(build_metrics(step))
                assert len((tmp_path / "m.jsonl").read_text().splitlines()) == step

    def test_reads_back_what_was_written(self, tmp_path):
        steps = [build_metrics(1), build_metrics(2, 0.1 + 0.2, aux_loss=1 / 3)]
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            for metrics in steps:
                writer.write(metrics)
        assert read_metrics(tmp_path / "m.jsonl") == steps

    def test_numbers_that_are_not_finite_become_null(self, tmp_path):
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            writer.write(build_metrics(loss=math.nan, grad_norm=math.inf))
        record = json.loads((tmp_path / "m.jsonl").read_text())
        assert (record["loss"], record["grad_norm"]) == (None, None)
        (metrics,) = read_metrics(tmp_path / "m.jsonl")
        assert math.isnan(metrics.loss)
        assert metrics.aux_loss is None

    def test_a_fresh_run_drops_an_older_file(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        with MetricsWriter(tmp_path / "m.jsonl") as writer:
            writer.write(build_metrics())
        assert [m.step for m in read_metrics(tmp_path / "m.jsonl")] == [1]

    def test_resuming_continues_the_copy_of_the_checkpoint(self, tmp_path):
        """Lines that a dead run wrote after its last checkpoint are dropped, a torn one too."""
        path, saved = tmp_path / "m.jsonl", tmp_path / "saved.jsonl"
        with MetricsWriter(path) as writer:
            for step in range(1, 5):
                writer.write(build_metrics(step, float(step)))
                if step == 2:
                    saved.write_bytes(path.read_bytes())
        path.write_text(path.read_text()[:-20])
        before = saved.read_bytes()
        with MetricsWriter(path, after=saved) as writer:
            writer.write(build_metrics(3, 30.0))
        assert [(m.step, m.loss) for m in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
        assert saved.read_bytes() == before


def test_totals_add_sums_and_keep_peaks():
    totals = RunTotals()
    totals = totals.plus(build_metrics(1, mem_peak_bytes=500, mem_alloc_bytes=3))
    totals = totals.plus(build_metrics(2, tokens=1, input_tokens=2, mem_alloc_bytes=4))
    assert totals == RunTotals(
        steps=2, tokens=11, input_tokens=32, mem_peak_bytes=500, mem_alloc_bytes=4
    )
