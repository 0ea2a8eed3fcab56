"""`plan calibrate`: two short runs of the FSDP2 script on this node, and what a byte costs here."""

import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from megablocks_utils.config import OPTIONS, RunConfig, parse_args
from megablocks_utils.config.command import Command
from megablocks_utils.config.given import split_line
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.reader import (
    build_section,
    check_required,
    choose_model,
    refuse_unknown,
    scan_words,
)
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import METRICS_NAME, RUN_RECORD_NAME, write_json_atomically
from megablocks_utils.planning.memory.scenario import Scenario, read_shape
from megablocks_utils.planning.model.config_file import (
    find_config_file,
    launch_name,
    read_config_file,
)
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.planning.plan_options import check_output_file, list_words
from megablocks_utils.planning.speed.calibration import (
    Calibration,
    TimedRun,
    build_record,
    describe_workload,
    solve,
)
from megablocks_utils.planning.speed.launch_lines import LAYOUT_OPTIONS

__all__ = ["COMMAND", "calibrate", "run_command"]


@dataclass(frozen=True)
class CalibrateArguments:
    """Hold the options of the command itself."""

    nproc: Annotated[int, Option("processes: the GPUs of this node", minimum=2, limit=1024)]
    output: Annotated[
        Path,
        Option(
            "where the result goes, JSON; its folder needs room for the trained model for a while",
            metavar="FILE",
            wanted="a file to write",
        ),
    ]
    steps: Annotated[int, Option("optimizer steps of each run that are timed", minimum=2)] = 10
    warmup: Annotated[int, Option("optimizer steps of each run before these", minimum=1)] = 5


COMMAND = Command(
    usage=(
        "python -m megablocks_utils.plan calibrate MODEL --nproc N --output FILE [--option value] "
        "...",
    ),
    about=(
        "Trains MODEL twice for some steps on the GPUs (or CPU cores) of this node: without expert "
        "parallelism, and with the largest --ep_size. From the times of both it solves t = h + c / "
        "b: b, the bytes a rank sends a second, and h, the rest of a micro-step. plan --calibration"
        " FILE then gives seconds for the same model, batch, method and number of processes.",
    ),
    options=list_options(CalibrateArguments),
    positional="MODEL",
    positional_help="model folder with weights, or Hub name in the local cache",
    closing=(
        "Every option of train_accelerate_fsdp2.py is taken, apart from those of the layout.",
        "Exit codes: 0 done; 2 a bad option, or runs that do not tell b, said in one sentence; 1 "
        "anything unexpected.",
    ),
    run_options=OPTIONS,
)
_SCRIPT = Path(__file__).resolve().parents[2] / "train_accelerate_fsdp2.py"
_OURS = ("model_name_or_path", "output_dir", "overwrite_output_dir", "max_steps", "save_strategy")


@dataclass(frozen=True)
class _Task:
    """What is to be run."""

    model: str
    config: RunConfig
    words: tuple[str, ...]
    nproc: int
    warmup: int
    steps: int
    output: Path

    def command(self, layout: ParallelLayout, folder: Path) -> list[str]:
        """Return the command of one run."""
        options: dict[str, Any] = {
            "model_name_or_path": launch_name(self.model),
            "output_dir": folder,
            "max_steps": self.warmup + self.steps,
            "save_strategy": "no",
            "use_megablocks_sharding": layout.ep_size > 1,
        }
        if layout.ep_size > 1:
            options |= {"ep_size": layout.ep_size, "expert_dp": layout.expert_dp}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        pairs = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        head = [sys.executable, *launcher, str(self.nproc), str(_SCRIPT)]
        return [*head, *pairs, *self.words]


def run_command(command: Sequence[str]) -> int:
    """Run a command, its messages going where ours go; return its exit code."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


def calibrate(argv: Sequence[str], run: Callable[[Sequence[str]], int] = run_command) -> None:
    """Make both runs, solve, and write the result, complete or not at all.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: bad options, a run that failed, or runs that cannot tell the cost of a byte.
    """
    task = _read_task(argv)
    if not _SCRIPT.is_file():
        raise ConfigurationError(
            f"plan calibrate starts {_SCRIPT.name}, which is not installed with the package; "
            "call it in a checkout of this project: python -m megablocks_utils.plan calibrate."
        )
    for name in ("expert_tp_size", "tp_size"):
        size = getattr(task.config.parallel, name)
        if size > 1:
            raise ConfigurationError(
                f"--{name} is {size}, but plan calibrate also runs without expert parallelism, "
                "which it needs: it must be 1."
            )
    shape = read_shape(task.config, read_config_file(find_config_file(task.model)))
    scenario = Scenario(
        config=task.config,
        shape=shape,
        world_size=task.nproc,
        device_type="cuda",
        kernel="grouped_mm",
        tokens=1,
        label_tokens=1,
        examples=task.config.optim.per_device_train_batch_size,
    )
    sizes = [layout.ep_size for layout in scenario.legal_layouts()]
    if max(sizes) == 1:
        raise ConfigurationError(
            f"--nproc is {task.nproc}, but it must have a divisor above 1 that divides the "
            f"{shape.num_experts} experts of this model too."
        )
    layouts = (ParallelLayout(1, "shard"), ParallelLayout(max(sizes), "shard"))
    with tempfile.TemporaryDirectory(dir=task.output.absolute().parent) as folder:
        results = [_run(task, layout, Path(folder, "run"), run) for layout in layouts]
    calibration, runs = _solve(task, scenario, layouts, results)
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "runs": [
            {key: record.get(key) for key in ("command", "commit", "versions", "hardware")}
            for record, _ in results
        ],
    }
    write_json_atomically(task.output, build_record(calibration, runs, provenance))
    _show(calibration, runs, task.output)


def _run(
    task: _Task, layout: ParallelLayout, folder: Path, run: Callable[[Sequence[str]], int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make one run; return its run.json and the lines of metrics.jsonl after the warm-up."""
    code = run(task.command(layout, folder))
    if code:
        raise ConfigurationError(
            f"the run with {layout.describe()} ended with exit code {code}, for the reason above; "
            "nothing was written."
        )
    record = json.loads((folder / RUN_RECORD_NAME).read_text(encoding="utf-8"))
    text = (folder / METRICS_NAME).read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    lines = [record for record in records if "loss" in record][task.warmup :]
    for path in sorted(folder.rglob("*"), reverse=True):  # room for the next run's model
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    return record, lines


def _solve(
    task: _Task,
    scenario: Scenario,
    layouts: Sequence[ParallelLayout],
    results: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]],
) -> tuple[Calibration, list[TimedRun]]:
    """Solve with what the formulas say was sent for as many tokens as there really were."""
    runs = []
    accumulation = task.config.optim.gradient_accumulation_steps
    for layout, (record, lines) in zip(layouts, results, strict=True):
        tokens = sum(line["input_tokens"] for line in lines) / len(lines)
        per_rank = max(1, round(tokens / task.nproc / accumulation))
        has_gpus = bool(record.get("hardware", {}).get("gpus"))
        scenario = replace(
            scenario,
            device_type="cuda" if has_gpus else "cpu",
            tokens=per_rank,
            label_tokens=per_rank,
        )
        sent = sum(scenario.predict(layout).sent_bytes_per_step.values())
        times = [line["step_time_s"] / accumulation for line in lines]
        runs.append(TimedRun(layout.describe(), sent / accumulation, times))
    return solve(runs[0], runs[1], describe_workload(scenario)), runs


def _read_task(argv: Sequence[str]) -> _Task:
    own_line, line = split_line(scan_words(argv, COMMAND), COMMAND.options)
    refuse_unknown(line.given, COMMAND.names)
    values = own_line.read_values()
    check_required(values, COMMAND.options)
    own = build_section(CalibrateArguments, values)
    check_output_file("output", own.output)
    training = list_words(line.given, without=(*LAYOUT_OPTIONS, *_OURS))
    return _Task(
        model=choose_model(line),
        config=parse_args(training, entry_point="fsdp2"),
        words=tuple(training),
        nproc=own.nproc,
        warmup=own.warmup,
        steps=own.steps,
        output=own.output,
    )


def _show(calibration: Calibration, runs: Sequence[TimedRun], output: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for run in runs:
        console.print(
            f"{run.name}: {run.median_s:.4g} s a micro-step (half within {run.spread_s:.2g} s), "
            f"{run.sent_bytes / 1e9:.3g} GB sent a rank",
            soft_wrap=True,
        )
    console.print(
        f"{calibration.bytes_per_s / 1e9:.3g} GB/s a rank and {calibration.overhead_s:.4g} s a "
        f"micro-step besides; written to {output}",
        markup=False,
        soft_wrap=True,
    )
