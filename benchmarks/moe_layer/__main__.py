"""One MoE layer: our kernels against those of others, checked and measured.

    PYTHONPATH=. python -m benchmarks.moe_layer            (one GPU, at most 24 minutes)
    PYTHONPATH=. python -m benchmarks.moe_layer --cpu      (our grouped_mm, on any machine)
    PYTHONPATH=. python -m benchmarks.moe_layer --report   (tables, aims, chart; measures nothing)

On a GPU every contender has processes of its own, and every row is written as soon as it is
measured: an interrupted run loses nothing, and `--resume` measures the rows that are missing. What
cannot run is a row that says why.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.case import has_words
from benchmarks.harness.device_timing import describe_device, describe_timing
from benchmarks.harness.processes import single_process
from benchmarks.harness.provenance import RESULTS, ROOT, build_provenance
from benchmarks.harness.record import Record
from benchmarks.harness.report import fill_in, show
from benchmarks.moe_layer.cases import GPU_SHAPES, MODES, ROUTINGS, TINY, order_cases
from benchmarks.moe_layer.check import describe_check
from benchmarks.moe_layer.contenders import CONTENDERS
from benchmarks.moe_layer.measure import (
    CPU_METHOD,
    CPU_PLAN,
    QUICK,
    QUICK_CPU_PLAN,
    Effort,
    describe_memory,
    measure_cpu_case,
)
from benchmarks.moe_layer.processes import Selection, run_contenders, work
from benchmarks.moe_layer.report import build_report

MODULE = "benchmarks.moe_layer"
GPU_RESULTS, CPU_RESULTS = RESULTS / "moe_layer_gpu.json", RESULTS / "moe_layer_cpu.json"
CHART = ROOT / "docs" / "moe_layer.png"
_QUICK_TOKENS = 600


def main(argv: list[str]) -> None:
    """Report, or measure on a CPU, or measure on a GPU, or be one of its processes."""
    options = _parse(argv)
    # The profiler that counts memory would otherwise write to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.report:
        _report(options)
    elif options.worker:
        _work(options)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            usual = CPU_RESULTS if options.cpu else GPU_RESULTS
            path = options.output or (Path(scratch) / usual.name if options.quick else usual)
            path = path.resolve()  # the processes run in another folder
            measure = _measure_cpu if options.cpu else _measure_gpu
            measure(argv, options, path)
            files = (None, path) if options.cpu else (path, None)
            show(build_report(*files)["cpu" if options.cpu else "gpu"])


def _measure_gpu(argv: list[str], options: argparse.Namespace, path: Path) -> None:
    end = time.time() + 60 * options.minutes
    _start_record(argv, options, path)
    command = [sys.executable, "-m", MODULE, *argv, "--output", str(path)]
    run_contenders(path, _select(options), command, end)


def _work(options: argparse.Namespace) -> None:
    work(
        Record.read(options.output),
        _select(options).of(options.worker),
        options.worker,
        deadline=options.deadline,
        device=torch.device(options.device),
        effort=QUICK if options.quick else Effort(),
    )


def _measure_cpu(argv: list[str], options: argparse.Namespace, path: Path) -> None:
    plan = QUICK_CPU_PLAN if options.quick else CPU_PLAN
    settings = {"threads": torch.get_num_threads(), "plan": asdict(plan), "method": CPU_METHOD}
    record = Record(path, build_provenance(MODULE, argv, **settings))
    with single_process(torch.device("cpu")):
        for case in plan.cases():
            if has_words(f"{case.label()}, {case.dtype}", options.only):
                record.add(measure_cpu_case(case, plan))


def _start_record(argv: list[str], options: argparse.Namespace, path: Path) -> None:
    """Start the file, or check that the one to resume is of this commit and kind of device.

    Another one would put numbers of two programs or two machines into one table.
    """
    device = torch.device(options.device)
    new = build_provenance(
        MODULE, argv, device=describe_device(device), method=_describe_method(device)
    )
    if not (options.resume and path.exists()):
        Record(path, new | {"rows": []}).write()
        return
    found = Record.read(path).content
    for key in ("commit", "device"):
        if found[key] != new[key]:
            options.refuse(f"--resume: {path} has {key} {found[key]}, here it is {new[key]}")


def _describe_method(device: torch.device) -> dict[str, str]:
    return {
        "time": describe_timing(device),
        "check": describe_check(),
        "forward": "one forward pass that keeps what its backward pass needs.",
        "forward_backward": "that, and torch.autograd.grad of tokens, routing weights and what is "
        "trained, from a given gradient of the output.",
        **describe_memory(device),
    }


def _select(options: argparse.Namespace) -> Selection:
    shapes = (TINY,) if options.quick else _chosen(options.shapes, GPU_SHAPES)
    tokens = min(options.tokens, _QUICK_TOKENS) if options.quick else options.tokens
    modes = _chosen(options.modes, MODES)
    cases = order_cases(shapes, modes, tuple(options.routings), tokens)
    return Selection(tuple(cases), tuple(options.backends), options.only)


def _chosen(names: list[str] | None, known: tuple[Any, ...]) -> tuple[Any, ...]:
    return known if names is None else tuple(one for one in known if one.name in names)


def _report(options: argparse.Namespace) -> None:
    parts = build_report(GPU_RESULTS, CPU_RESULTS, CHART)
    for part in parts.values():
        show(part)
    if options.docs:
        text = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(fill_in(text, parts, "moe_layer"), encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cpu", action="store_true", help="our grouped_mm on a CPU, in turns with transformers'")
    add("--report", action="store_true", help="write tables, aims and the chart from the files")
    add("--docs", type=Path, help="with --report: the Markdown file whose marked parts to fill")
    add("--quick", action="store_true", help="tiny, and no file unless --output")
    add("--resume", action="store_true", help="keep the rows of the file, measure the others")
    add("--output", type=Path, help=f"the JSON file (default: {GPU_RESULTS.name})")
    add("--device", default="cuda", help="cuda; cpu tries out the benchmark itself")
    add("--minutes", type=float, default=24.0, help="time for everything, on a GPU")
    add("--tokens", type=int, default=16384, help="tokens of a layer")
    add("--shapes", nargs="+", choices=[s.name for s in GPU_SHAPES], help="default: all")
    add("--modes", nargs="+", choices=[m.name for m in MODES], help="default: all")
    add("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default: all")
    add(
        "--backends",
        nargs="+",
        choices=list(CONTENDERS),
        default=list(CONTENDERS),
        help="default: all",
    )
    add("--only", default="", help="cases whose contender and label hold all these words")
    add("--worker", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    needs_gpu = not (options.cpu or options.report) and options.device == "cuda"
    if needs_gpu and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no GPU; --cpu measures what a CPU can run")
    options.refuse = parser.error
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
