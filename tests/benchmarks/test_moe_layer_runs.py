"""The layer benchmark loses no row, whatever happens, and reports what the rows say."""

import json
import sys

import pytest
import torch

from benchmarks.harness.contender import SkippedError
from benchmarks.harness.device_timing import Machine
from benchmarks.harness.record import Record
from benchmarks.moe_layer import __main__ as moe_layer
from benchmarks.moe_layer import measure, processes
from benchmarks.moe_layer.aims import cpu_aims, gpu_aims
from benchmarks.moe_layer.cases import FULL, LORA16, MIXTRAL, QWEN3, TINY, Case
from benchmarks.moe_layer.check import WrongError
from benchmarks.moe_layer.contenders import BASELINE, OURS, OURS_GROUPED_MM, SCATTERMOE
from benchmarks.moe_layer.measure import QUICK, measure_case
from benchmarks.moe_layer.processes import (
    STARTED,
    Selection,
    add_row,
    find_row,
    is_settled,
    run_contenders,
)
from benchmarks.moe_layer.report import build_report

CPU = torch.device("cpu")
GIB = 2**30
CASES = tuple(Case(TINY, mode, "uniform", 600) for mode in (LORA16, FULL))


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (SkippedError("not installed"), "skipped", "not installed"),
        (WrongError("output is off"), "wrong", "output is off"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has less."),
            "out of memory",
            "CUDA out of memory. Tried to allocate 9 GiB.",
        ),
    ],
)
def test_what_a_contender_cannot_do_is_a_row_that_says_why(monkeypatch, failure, status, reason):
    def build(*_):
        raise failure

    monkeypatch.setitem(measure.CONTENDERS, OURS, build)
    row = measure_case(OURS, CASES[0], Machine(1e12, 1e11), CPU, QUICK)
    assert row == {
        "side": OURS,
        "case": CASES[0].describe(),
        "status": status,
        "reason": reason,
    }


def new_record(path, **content):
    record = Record(path, {"commit": "c", "device": {"name": "cpu"}, "rows": []} | content)
    record.write()
    return record


def reasons(path):
    return [
        (row["side"], row["case"]["mode"], row["status"], row["reason"])
        for row in Record.read(path).rows
    ]


def test_a_contender_that_breaks_its_process_costs_one_row_and_then_is_given_up(
    tmp_path, monkeypatch
):
    path, calls = tmp_path / "rows.json", []
    new_record(path)
    selection = Selection(CASES, (OURS, BASELINE))

    def run(command, deadline):
        name = command[command.index("--worker") + 1]
        calls.append(name)
        if name == BASELINE:
            return "exit code 1: no module"  # before it started any case
        record = Record.read(path)
        started = next(case for case in CASES if find_row(record, OURS, case) is None)
        add_row(record, processes._row(OURS, started, "not reached", STARTED))
        return "exit code -6: illegal access"

    monkeypatch.setattr(processes, "_run", run)
    run_contenders(path, selection, ["python"], end=processes.time.time() + 1000)
    assert calls == [OURS] * 2 + [BASELINE] * 3
    assert reasons(path) == [
        (OURS, "lora16", "failed", "exit code -6: illegal access"),
        (OURS, "full", "failed", "exit code -6: illegal access"),
        (BASELINE, "lora16", "failed", "exit code 1: no module"),
        (BASELINE, "full", "failed", "exit code 1: no module"),
    ]


def test_what_the_time_was_too_short_for_is_said_and_measured_by_the_next_run(tmp_path):
    path = tmp_path / "rows.json"
    record = new_record(path)
    measured = {"side": OURS, "case": CASES[0].describe(), "status": "measured"}
    record.add(measured)
    run_contenders(path, Selection(CASES, (OURS,)), ["python"], end=0.0)
    record = Record.read(path)
    rows = record.rows
    assert rows[0] == measured
    assert (rows[1]["case"]["mode"], rows[1]["status"]) == ("full", "not reached")
    assert is_settled(record, OURS, CASES[0]) and not is_settled(record, OURS, CASES[1])


def test_the_reason_of_a_failed_process_is_its_last_line():
    words = [sys.executable, "-c", "raise SystemExit('no kernel image')"]
    assert processes._run(words, processes.time.time()) == "exit code 1: no kernel image"
    assert processes._run([sys.executable, "-c", "pass"], processes.time.time()) is None


def test_rows_of_another_commit_are_not_mixed_in(tmp_path, capsys):
    path = tmp_path / "rows.json"
    new_record(path)
    with pytest.raises(SystemExit) as end:
        moe_layer.main(["--device", "cpu", "--resume", "--output", str(path)])
    assert end.value.code == 2
    assert "has commit c, here it is" in capsys.readouterr().err


# --- whole runs ------------------------------------------------------------------------------


def test_quick_run_of_the_gpu_part(tmp_path, monkeypatch, capsys):
    """On a CPU, and what a contender's process would do is done here: an import costs 5 seconds."""
    path, started = tmp_path / "rows.json", []

    def run(command, deadline):
        started.append(command[:3])
        moe_layer.main(command[3:])

    monkeypatch.setattr(processes, "_run", run)
    words = ["--device", "cpu", "--quick", "--modes", "lora16", "--routings", "uniform"]
    moe_layer.main([*words, "--backends", OURS_GROUPED_MM, "--output", str(path)])
    assert started == [[sys.executable, "-m", "benchmarks.moe_layer"]]
    assert "ours, grouped_mm" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert {"command", "commit", "versions", "hardware", "date", "method"} <= result.keys()
    assert result["machine"]["flops_per_s"] > 0 < result["machine"]["bytes_per_s"]
    (row,) = result["rows"]
    assert row["status"] == "measured" and row["case"]["tokens"] == 600
    assert row["ms"]["forward"]["n"] == row["ms"]["forward_backward"]["n"] == 10
    seconds = row["ms"]["forward_backward"]["median"] / 1e3
    flops = 12 * 600 * TINY.top_k * TINY.hidden_size * TINY.intermediate_size
    both = row["derived"]["forward_backward"]
    assert both["tflops"] == pytest.approx(flops / seconds / 1e12)
    assert both["share_here"] == pytest.approx(both["floor_here_ms"] / 1e3 / seconds)
    assert row["peak_bytes"] > row["saved_bytes"] > row["least_saved_bytes"] > 0


def test_quick_run_of_the_cpu_part(tmp_path, capsys):
    path = tmp_path / "rows.json"
    moe_layer.main(["--cpu", "--quick", "--only", "lora16 bfloat16", "--output", str(path)])
    assert "PEFT over transformers" in capsys.readouterr().out
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert list(row["against"]) == [BASELINE, "peft"]
    assert all(seen["ratio"]["n"] == 3 for seen in row["against"].values())
    assert (
        row["memory"].keys() == row["used_of_bound"].keys() == {OURS_GROUPED_MM, BASELINE, "peft"}
    )
    assert 0 < max(row["used_of_bound"].values()) <= 1


# --- the report ------------------------------------------------------------------------------


def gpu_row(shape, mode, side, ms, **more):
    case = Case(shape, mode, "uniform", 16384)
    times = {phase: {"n": 50, "median": ms, "min": ms, "max": ms} for phase in measure.PHASES}
    return {
        "side": side,
        "case": case.describe(),
        "status": "measured",
        "ms": times,
        "derived": measure.derive(case, times, Machine(700e12, 2.8e12)),
        "saved_bytes": int(1.876 * GIB),
        "peak_bytes": 4 * GIB,
    } | more


def gpu_rows():
    missing = {"status": "skipped", "reason": "scattermoe is not installed"}
    broken = gpu_row(QWEN3, LORA16, OURS, 9.0)
    broken |= {"status": "wrong", "reason": "output is off by 1.0e-01, more than 1.0e-02"}
    return [
        gpu_row(MIXTRAL, LORA16, OURS, 48.0),
        gpu_row(MIXTRAL, LORA16, BASELINE, 76.8, saved_bytes=4 * GIB),
        gpu_row(MIXTRAL, FULL, OURS, 80.0, saved_bytes=2 * GIB),
        gpu_row(MIXTRAL, FULL, BASELINE, 84.0),
        {k: v for k, v in gpu_row(MIXTRAL, FULL, SCATTERMOE, 1.0).items() if k != "ms"} | missing,
        broken,
    ]


def test_aims_are_reached_missed_or_not_measured_with_the_number():
    lines = [aim.line() for aim in gpu_aims(gpu_rows())]
    baseline = "ours, triton against transformers grouped_mm (adapters split)"
    for line in (
        f"Mixtral-8x7B, lora16: {baseline}, forward and backward: at least 1.5 x; 1.60 x: reached",
        "Mixtral-8x7B, lora16: share of the H100's floor, forward and backward: at least 60%; "
        "62.6%: reached",
        f"Mixtral-8x7B, full: {baseline}, forward and backward: at least 1.1 x; 1.05 x: **missed**",
        "Mixtral-8x7B, full: ours, triton against ScatterMoE, forward and backward: at least "
        "1.3 x; ScatterMoE skipped: scattermoe is not installed: not measured",
        "Mixtral-8x7B, lora16: saved for backward: at most 1.88 GiB; 1.88 GiB (transformers "
        "grouped_mm (adapters split): 4.00): reached",
        "Mixtral-8x7B, full: saved for backward: at most 1.88 GiB; 2.00 GiB (transformers "
        "grouped_mm (adapters split): 1.88): **missed**",
        f"Qwen3-30B-A3B, lora16: {baseline}, forward and backward: at least 1.5 x; ours, triton "
        "wrong: output is off by 1.0e-01, more than 1.0e-02: not measured",
    ):
        assert f"- {line}" in lines
    assert {aim.is_reached for aim in gpu_aims([])} == {None}


@pytest.mark.parametrize(
    ("mode", "ratio", "is_reached"),
    [("full", 1.0, True), ("full", 0.99, False), ("frozen", 1.0, False), ("lora16", 1.01, True)],
)
def test_frozen_experts_must_gain_on_a_cpu_and_full_training_must_not_lose(mode, ratio, is_reached):
    case = {"name": "tiny", "mode": mode, "dtype": "float32"}
    (aim,) = cpu_aims([{"case": case, "against": {BASELINE: {"ratio": {"median": ratio}}}}])
    assert aim.is_reached is is_reached


def test_report_has_tables_aims_reasons_and_a_chart(tmp_path):
    gpu, chart = tmp_path / "gpu.json", tmp_path / "moe_layer.png"
    content = {"command": "python -m x", "commit": None, "date": "2026-01-02T03:04"}
    content |= {"versions": {"torch": "2.13"}, "device": {"name": "H100"}, "rows": gpu_rows()}
    content |= {"machine": {"flops_per_s": 7e14, "bytes_per_s": 2.8e12}}
    gpu.write_text(json.dumps(content))
    parts = build_report(gpu, tmp_path / "missing.json", chart)
    assert chart.read_bytes().startswith(b"\x89PNG")
    text = parts["gpu"]
    assert "H100: 700 TFLOP/s in a large bf16 product, 2.80 TB/s in a large copy." in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    figures = ["48.00 (48.00-48.00)"] * 2 + ["481", "69%", "71%", "63%", "1.88", "4.00"]
    assert ["lora16", "ours, triton", *figures] in cells
    assert ["full", "ScatterMoE"] not in [line[:2] for line in cells]
    assert ["lora16", "ours, triton", "wrong"] in [line[:3] for line in cells]
    assert "- ScatterMoE, skipped (Mixtral-8x7B full uniform): scattermoe is not installed" in text
    assert parts["cpu"] == "Not measured yet."
    nothing = build_report(tmp_path / "missing.json", gpu.with_name("none"), None)["gpu"]
    assert nothing.startswith("No GPU was at hand: nothing was timed on one.")
