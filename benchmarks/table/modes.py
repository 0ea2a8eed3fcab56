"""The four ways to fill the table."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.harness.launchers import ForkedRanks, Torchrun
from benchmarks.harness.outcome import MEASURED
from benchmarks.harness.workload import build_config, save_equal_examples, save_model
from benchmarks.table.bench import TOY_SIZES, Bench, build_bench
from benchmarks.table.one_gpu import Start, rehearse_row
from benchmarks.table.options import CPU, ONE_GPU, PLAN, REAL, TableOptions
from benchmarks.table.record import TableRecord
from benchmarks.table.rows import TRANSFORMERS, Row
from benchmarks.table.runs import (
    RunPaths,
    find_unsupported_reason,
    measure_row_memory,
    run_row,
    take_rounds,
)
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.model.config_file import find_config_file, read_config_file
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.units import format_gb

Say = Callable[[str], None]
_STEPS_OF_DATA = 4
_BYTES = 2  # of a weight in bfloat16

_PREDICTED = "the formulas of `python -m megablocks_utils.plan`, for this layout and these options"
_STEP_TIME = (
    "step_time_s of metrics.jsonl (wall time of the slowest rank) over the micro-steps of a step, "
    "of every measured step of every run"
)
_RATIO = "other / this, of the medians of two runs of the same round; above 1, this row is faster"


def fill_table(options: TableOptions, argv: Sequence[str], say: Say) -> dict[str, Any]:
    """Fill the table as a mode does, write its JSON after every run, and return its content.

    Args:
        options: of the command line.
        argv: the command line itself.
        say: takes a line of progress.

    Raises:
        ConfigurationError: a machine that cannot run the mode.
    """
    return {PLAN: _plan, ONE_GPU: _one_gpu, CPU: _cpu, REAL: _real}[options.mode](
        options, argv, say
    )


def _plan(options: TableOptions, argv: Sequence[str], say: Say) -> dict[str, Any]:
    del say
    record = TableRecord(
        options.output,
        argv,
        rows=options.rows,
        bench=build_bench(options),
        method={"predicted": _PREDICTED},
    )
    record.write()
    return record.content


def _one_gpu(options: TableOptions, argv: Sequence[str], say: Say) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "--one_gpu needs a CUDA GPU, but torch finds none here; --plan predicts the memory."
        )
    return measure_memory(build_bench(options), options, argv, say)


def measure_memory(
    bench: Bench,
    options: TableOptions,
    argv: Sequence[str],
    say: Say,
    *,
    start: Start | None = None,
) -> dict[str, Any]:
    """Measure the memory of every row on one device.

    Args:
        bench: how.
        options: of the command line.
        argv: the command line itself.
        say: takes a line of progress.
        start: as `rehearse_row` takes it.
    """
    method = {
        "predicted": f"{_PREDICTED}; even routing",
        "peak_bytes": "torch.cuda.max_memory_allocated over an optimizer step of two micro-steps, "
        "weights and Adam's states made before; rank 0, its peers fake (fake process group), "
        "real tensors and kernels, even routing",
        "allocated_bytes": "torch.cuda.memory_allocated after zero_grad",
    }
    record = TableRecord(options.output, argv, rows=options.rows, bench=bench, method=method)
    with tempfile.TemporaryDirectory() as name:
        build_config(bench.config).save_pretrained(name)
        for row in options.rows:
            unsupported_reason = find_unsupported_reason(row, bench)
            outcome = unsupported_reason or rehearse_row(row, bench, Path(name), start)
            if outcome["status"] == MEASURED:
                record.add_run(row, outcome)
            else:
                record.settle(row, outcome)
            say(_summary(row, outcome))
    return record.content


def _cpu(options: TableOptions, argv: Sequence[str], say: Say) -> dict[str, Any]:
    bench = build_bench(options)
    method = {
        "predicted": f"{_PREDICTED}, and the measured base of the process",
        "micro_step_s": _STEP_TIME,
        "ratios": _RATIO,
        "peak_bytes": "resident memory (VmHWM), of a run of two steps for it alone, in which glibc "
        "hands freed memory back at once",
        "allocated_bytes": "resident memory (VmRSS) after zero_grad, of the same run",
        "base_peak_bytes": "peak_bytes of the same row with next to no model: Python, libraries, "
        "connections; likewise base_allocated_bytes",
    }
    record = TableRecord(options.output, argv, rows=options.rows, bench=bench, method=method)
    with tempfile.TemporaryDirectory() as name:
        paths = _make_paths(bench, Path(name, "model"))
        toy = _make_paths(replace(bench, config={**bench.config, **TOY_SIZES}), Path(name, "toy"))
        launch = ForkedRanks(frees_at_once=True)
        measure = partial(measure_row_memory, bench=bench, paths=paths, toy=toy, launch=launch)
        run = partial(run_row, bench=bench, paths=paths, launch=ForkedRanks())
        rows = _settle_unsupported(record, options.rows, bench, say)
        take_rounds(rows, bench.rounds, _watched(run, record.add_run, say))
        timed = [row for row in rows if record.entry(row)["status"] == MEASURED]
        take_rounds(timed, 1, _watched(measure, record.add_memory, say))
    return record.content


def _real(options: TableOptions, argv: Sequence[str], say: Say) -> dict[str, Any]:
    num_gpus = torch.cuda.device_count()
    if num_gpus < options.ranks:
        raise ConfigurationError(
            f"--ranks is {options.ranks}, but torch finds {num_gpus} GPUs here; --one_gpu measures "
            "memory on one, --cpu runs a small model without, --plan predicts."
        )
    config = read_config_file(find_config_file(options.model_name_or_path))
    bench = build_bench(options, config)
    method = {
        "predicted": _PREDICTED,
        "micro_step_s": _STEP_TIME,
        "ratios": _RATIO,
        "peak_bytes": "torch.cuda.max_memory_allocated since the run's start, of the fullest rank",
        "allocated_bytes": "torch.cuda.memory_allocated after zero_grad, of the fullest rank",
    }
    scratch = Path(options.scratch or tempfile.gettempdir())
    _check_space(scratch, bench.shape, options.rows)
    record = TableRecord(options.output, argv, rows=options.rows, bench=bench, method=method)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        data = Path(name, "data.jsonl")
        _save_data(bench, data)
        paths = RunPaths(options.model_name_or_path, data, Path(name))
        run = partial(run_row, bench=bench, paths=paths, launch=Torchrun())
        rows = _settle_unsupported(record, options.rows, bench, say)
        take_rounds(rows, bench.rounds, _watched(run, record.add_run, say))
    return record.content


def _settle_unsupported(
    record: TableRecord, rows: Sequence[Row], bench: Bench, say: Say
) -> list[Row]:
    """Return the rows that can be tried, and record why the others cannot."""
    tried: list[Row] = []
    for row in rows:
        unsupported_reason = find_unsupported_reason(row, bench, tried)
        if unsupported_reason is None:
            tried.append(row)
        else:
            record.settle(row, unsupported_reason)
            say(_summary(row, unsupported_reason))
    return tried


def _watched(
    run: Callable[[Row], dict[str, Any]], keep: Callable[[Row, dict[str, Any]], None], say: Say
) -> Callable[[Row], dict[str, Any]]:
    def watched(row: Row) -> dict[str, Any]:
        outcome = run(row)
        keep(row, outcome)
        say(_summary(row, outcome))
        return outcome

    return watched


def _summary(row: Row, outcome: dict[str, Any]) -> str:
    if outcome["status"] != MEASURED:
        return f"{row.name}: {outcome['status']}: {outcome['reason']}"
    times = outcome.get("micro_step_s", [])
    seconds = f"{sorted(times)[len(times) // 2]:.3f} s a micro-step, " if times else ""
    return f"{row.name}: {seconds}peak {format_gb(outcome['peak_bytes'])}"


def _make_paths(bench: Bench, folder: Path) -> RunPaths:
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    logging.disable_progress_bar()
    save_model(build_config(bench.config), folder / "model")
    _save_data(bench, folder / "data.jsonl")
    return RunPaths(str(folder / "model"), folder / "data.jsonl", scratch)


def _save_data(bench: Bench, path: Path) -> None:
    count = _STEPS_OF_DATA * bench.ranks * bench.accumulation
    save_equal_examples(path, vocab_size=bench.shape.vocab_size, tokens=bench.tokens, count=count)


def _check_space(scratch: Path, shape: ModelShape, rows: Sequence[Row]) -> None:
    saves_model = any(row.use_lora == "none" and row.group != TRANSFORMERS for row in rows)
    needed = _BYTES * shape.num_parameters
    free = disk_usage(scratch).free
    if saves_model and free < needed:
        raise ConfigurationError(
            f"--scratch is {scratch}, where {format_gb(free)} are free, but a full row writes the "
            f"model there: it must have {format_gb(needed)}."
        )
