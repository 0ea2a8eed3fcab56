"""Every part of the GPU check runs through on a tiny scale, and no row is lost or passed over."""

import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import packed_attention
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import steps, training_runs
from benchmarks.gpu_check.options import CheckOptions
from benchmarks.gpu_check.part import Part, WrongFigureError, build_row, run_part
from benchmarks.gpu_check.programs import (
    ERROR_NAME,
    OUTPUT_NAME,
    Finished,
    FreshProcess,
    Program,
    run_programs,
)
from benchmarks.gpu_check.trace_figures import Units, summarise
from benchmarks.gpu_check.training_runs import RunCase, compare, find_unsupported, list_cases
from benchmarks.harness.outcome import Ending
from benchmarks.harness.record import Record
from benchmarks.moe_layer import __main__ as moe_layer
from megablocks_utils import tune
from megablocks_utils.config import parse_args
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.rehearsal.worker import read_request
from tests.support.rank_pool import start_forkserver


class ForkedProgram:
    """A program in a process that is forked from one that has imported the libraries."""

    def __init__(self, program, folder):
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        arguments = (program.words, program.variables(), program.stdin, folder)
        self._process = context.Process(target=be_program, args=arguments)
        self._process.start()

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()
        self._process.join()


def be_program(words, variables, stdin, folder):
    """Do what `python WORDS` does."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    for name, stream in ((OUTPUT_NAME, sys.stdout), (ERROR_NAME, sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    (folder / "stdin").write_text(stdin)
    sys.stdin = (folder / "stdin").open()
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def run(part, folder, start=ForkedProgram, *more):
    words = ["--part", str(part), "--output", str(folder), "--device", "cpu", *more]
    gpu_check.main(words, start)
    content = json.loads((folder / f"part{part}.json").read_text())
    assert content["command"].startswith("python -m benchmarks.gpu_check --part ")
    assert {"torch", "triton", "transformers"} <= content["versions"].keys()
    return {row["name"]: row for row in content["rows"]}


# --- dry runs --------------------------------------------------------------------------------


def test_part_1_has_a_row_for_every_test(tmp_path):
    rows = run(1, tmp_path, FreshProcess)  # pytest wants to import Triton itself
    assert "tests/gpu/test_fused_experts.py::test_offsets_beyond_32_bits" in rows
    wanted = "left out" if not torch.cuda.is_available() else "measured"
    assert {row["status"] for row in rows.values()} == {wanted}


def test_part_2_compares_runs_of_both_scripts_with_references(tmp_path):
    rows = run(2, tmp_path, ForkedProgram, "--only", "fp32")  # bfloat16 is slow on a CPU
    assert {row["status"] for row in rows.values()} == {"measured"}
    reference, row = rows.values()
    assert reference["name"] == "reference: eager, fp32, checkpointing True, lora all"
    assert row["name"] == "run: grouped_mm, fp32, checkpointing True, lora all, fsdp1"
    assert row["kernel"]["name"] == "grouped_mm"
    assert len(row["loss"]) == len(row["grad_norm"]) == 2
    assert row["error"].keys() == row["bound"].keys() == {"loss", "grad_norm"}


def test_part_3_keeps_tiles_and_the_layers_rows(tmp_path):
    tiles, packed, layer = run(3, tmp_path).values()
    assert "weight_grad" in tiles["table"] and (tmp_path / tiles["file"]).is_file()
    assert "in nf4" in packed["table"]
    assert layer["rows"] == {"measured": 1} and (tmp_path / layer["file"]).is_file()


def test_part_4_measures_memory(tmp_path):
    [row] = run(4, tmp_path).values()
    assert row["peak_bytes"] >= row["allocated_bytes"] > 0


def test_part_5_traces_a_step(tmp_path):
    rows = run(5, tmp_path)
    assert {row["status"] for row in rows.values()} == {"measured"}
    [trace] = [row for name, row in rows.items() if name.startswith("trace: ")]
    shares = trace["host"]["share_of_time"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
    assert shares["experts"] > 0.1 and shares["attention"] > 0.1  # also backward
    assert list(tmp_path.glob("trace_*.json.gz"))


# --- rows ------------------------------------------------------------------------------------


def test_without_a_gpu_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run_entry_point(gpu_check.main, ["--part", "1", "--output", str(tmp_path / "new")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "--device is cuda, but torch finds no CUDA GPU here; --device cpu tries every part out on "
        "a tiny scale.\n"
    )
    assert not (tmp_path / "new").exists()


def programs(*codes, **settings):
    settings = {"timeout_s": 20.0, "least_s": 0.0} | settings
    return [Program(f"row {i}", ("-c", code), **settings) for i, code in enumerate(codes)]


def test_a_row_that_fails_or_hangs_costs_no_other(tmp_path):
    codes = ("import time; time.sleep(60)", "print('x'); raise SystemExit('no kernel image')", "1")
    deadline = time.monotonic() + 60
    found = run_programs(programs(*codes, timeout_s=0.5), tmp_path, deadline, jobs=3)
    rows = {row["name"]: row for row in (build_row(one, lambda _: {"x": 1}) for one in found)}
    assert rows["row 0"]["status"] == "failed" and "did not end" in rows["row 0"]["reason"]
    assert rows["row 1"]["reason"] == "no kernel image" and "x\n" in rows["row 1"]["log"]
    assert rows["row 2"]["status"] == "measured" and rows["row 2"]["x"] == 1


def test_what_the_time_is_too_short_for_is_said(tmp_path):
    codes = ("import time; time.sleep(60)", "1")
    deadline = time.monotonic() + 0.3
    found = run_programs(programs(*codes), tmp_path, deadline)
    first, second = (build_row(one, lambda _: {}) for one in found)
    assert first["status"] == second["status"] == "not reached"
    assert first["reason"].startswith("it had run 0 s") or first["reason"].startswith("it had run")
    assert second["reason"] == "the part's time was used up before it"


def test_a_failed_row_makes_exit_code_1(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, program, folder):
            (folder / ERROR_NAME).write_text("RuntimeError: an illegal memory access\n")

        def poll(self):
            return 1

    with pytest.raises(SystemExit) as ended:
        run(4, tmp_path, Broken)
    assert ended.value.code == 1
    [row] = json.loads((tmp_path / "part4.json").read_text())["rows"]
    assert row["status"] == "failed"
    assert row["reason"] == "RuntimeError: an illegal memory access"


def test_results_that_cannot_be_read_or_are_wrong_fail():
    finished = Finished(programs("1")[0], Path("none"), 1.0, Ending(0))
    assert "KeyError" in build_row(finished, lambda _: {}["x"])["reason"]

    def read(_):
        raise WrongFigureError("too much", {"error": 2.0})

    assert build_row(finished, read) | {"seconds": 0} == {
        "name": "row 0",
        "seconds": 0,
        "status": "failed",
        "reason": "too much",
        "error": 2.0,
    }


# --- figures ---------------------------------------------------------------------------------


def test_all_backends_precisions_and_checkpointing_modes_are_run():
    cases = list_cases()
    assert len({case.name for case in cases}) == len(cases)
    kernels = ("eager", "grouped_mm", "triton", "scattermoe", "megablocks")
    for precision in ("fp32", "mixed", "bf16_sr", "bf16"):
        for checkpointing in ("True", "False", "selective"):
            found = {
                c.kernel
                for c in cases
                if (c.precision, c.checkpointing)[:2] == (precision, checkpointing)
            }
            assert found >= set(kernels)
    missing = [find_unsupported(case) for case in cases if case.kernel == "megablocks"]
    assert {row["status"] for row in missing} == {"not installed"}


def measured(*losses):
    return {"status": "measured", "loss": list(losses), "grad_norm": [1.0] * len(losses)}


def test_a_run_may_be_off_by_what_its_precision_is_off_by():
    case = RunCase("triton", "bf16")
    references = {case.reference("fp32"): measured(4.0, 2.0), case.reference(): measured(4.0, 2.02)}
    good = compare(case, measured(4.1, 2.0), references)
    assert good["status"] == "measured" and good["bound"]["loss"] == pytest.approx(0.03)
    wrong = compare(case, measured(4.0, 2.07), references)
    assert wrong["status"] == "failed"
    assert wrong["reason"] == "loss is off by 3.5e-02 of the CPU's, but it may be 3.0e-02"
    assert compare(case, measured(float("nan"), 2.0), references)["status"] == "failed"
    exact = RunCase("triton", "fp32")
    assert compare(exact, measured(4.0, 2.0001), references)["status"] == "failed"
    assert compare(case, measured(4.0, 2.0), {})["status"] == "failed"


def host(name, ts, dur, cat="cpu_op", **args):
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 1, "tid": 1, "args": args}


def device(ts, dur, correlation, name="kernel", cat="kernel"):
    args = {"correlation": correlation}
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 0, "tid": 7, "args": args}


def test_figures_of_a_trace():
    """A layer: attention, experts with a wait, the experts' backward pass, the optimizer."""
    events = [
        host("attention", 0, 10, "user_annotation"),
        host("cuLaunchKernelEx", 2, 1, "cuda_driver", correlation=1),
        host("experts", 10, 20, "user_annotation"),
        host("RunExperts", 11, 15),
        host("cudaLaunchKernel", 12, 1, "cuda_runtime", correlation=2),
        host("cudaStreamSynchronize", 27, 2, "cuda_runtime"),
        host("autograd::engine::evaluate_function: RunExperts", 40, 10),
        host("cudaLaunchKernel", 41, 1, "cuda_runtime", correlation=3),
        {"ph": "s", "id": 5, "pid": 1, "tid": 1, "ts": 11, "cat": "fwdbwd", "name": "fwdbwd"},
        {"ph": "f", "id": 5, "pid": 1, "tid": 1, "ts": 40, "cat": "fwdbwd", "name": "fwdbwd"},
        host("Optimizer.step#AdamW.step", 60, 10, "user_annotation"),
        host("cudaLaunchKernel", 61, 1, "cuda_runtime", correlation=4),
        device(3, 5, 1),
        device(13, 20, 2),
        device(30, 2, 99, name="Memcpy DtoH (Device -> Pinned)", cat="gpu_memcpy"),
        device(42, 10, 3),
        device(70, 3, 4),
    ]
    found = summarise(events, Units(steps=1, micro_steps=1, layers=1))
    kernels = found["device"]
    assert kernels["kernels_per_layer"] == {
        "experts": 2,
        "attention": 1,
        "optimizer": 1,
        "other": 0,
    }
    assert kernels["share_of_time"]["experts"] == pytest.approx(30 / 40)
    assert kernels["copies_to_host_per_layer"] == 1
    assert kernels["gaps_per_layer"] == 3 and kernels["long_gaps_per_layer"] == 1
    assert kernels["idle_share"] == pytest.approx((5 + 9 + 18) / 70)
    assert kernels["step_s"] == pytest.approx(70e-6)
    assert found["host"]["waits_per_layer"]["experts"] == 1


# --- what a GPU would run ----------------------------------------------------------------------


def test_a_gpus_programs_have_options_that_they_take(tmp_path, monkeypatch):
    """Nothing runs: every program ends at once, after its words were kept."""
    started = []

    class Kept:
        def __init__(self, program, folder):
            started.append(program)

        def poll(self):
            return 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=141 * 10**9)
    )
    monkeypatch.setattr(training_runs, "save_workload", lambda *_: None)
    monkeypatch.setattr(steps, "_save", lambda _: None)
    for number in (2, 3, 4, 5):
        options = CheckOptions(number, str(tmp_path), "cuda")
        record = Record(None, {"rows": []})
        part = Part(options, record, tmp_path, tmp_path, time.monotonic() + 500, Kept)
        run_part(part)
        assert part.finish() and len(record.rows) >= 5
    assert len({program.name for program in started}) == len(started) > 55
    for program in started:
        assert program.hides_gpu == program.name.startswith("reference")
        words = list(program.words)
        if words[0].endswith(".py"):
            entry_point = "fsdp1" if words[0] == "train_fsdp1.py" else "fsdp2"
            parse_args(words[1:], entry_point=entry_point)
        elif words[1].endswith("trace_step"):
            parse_args(words[3:], entry_point="fsdp2")
        elif words[1].endswith("tune"):
            assert (Path(tune.parse_options(words[2:]).model_name_or_path) / "config.json").exists()
        elif words[1].endswith("moe_layer"):
            assert moe_layer._parse(words[2:]).minutes == 3
        elif words[1].endswith("packed_attention"):
            assert packed_attention.build_parser().parse_args(words[2:]).device == "cuda"
        elif words[1].endswith("one_gpu"):
            assert read_request(program.stdin)[2].device_type == "cuda"
        else:
            assert words[1:] == ["benchmarks.gpu_check.optimizer_rate", "cuda"]
