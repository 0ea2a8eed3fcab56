"""Full fine-tuning of the small real MoE in every precision: does each of them learn?

Each run is a fresh `torchrun` of the FSDP2 script with expert parallelism on two processes; what it
learned is measured on held-out examples with plain transformers in fp32.

    python -m benchmarks.precision            (about 25 minutes on 2 cores)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.launchers import FSDP2_SCRIPT, Job, Torchrun
from benchmarks.harness.outcome import explain
from benchmarks.harness.provenance import RESULTS, ROOT, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import markdown_table, show
from megablocks_utils.byte_units import GIB

RESULT = RESULTS / "precision_cpu.json"
PRECISIONS = ("fp32", "mixed", "bf16_sr", "bf16")
_TIMEOUT_S = 3600.0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "data/.cache/smollm2-moe")
    parser.add_argument("--data", type=Path, default=ROOT / "data/.cache/docs_train.json")
    parser.add_argument("--held_out", type=Path, default=ROOT / "data/.cache/docs_held_out.json")
    parser.add_argument("--num_held_out", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--processes", type=int, default=2)
    return parser


def run_training(options: argparse.Namespace, precision: str, seed: int, folder: Path) -> list[Row]:
    """Train once, leave the model in `output` of a folder, and return the metrics of its steps."""
    flags = {
        "model_name_or_path": options.model,
        "data_path": options.data,
        "output_dir": folder / "output",
        "use_megablocks_sharding": True,
        "precision": precision,
        "seed": seed,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "max_seq_length": 160,
        "per_device_train_batch_size": 2,
    }
    logs = folder / "logs"
    logs.mkdir()
    ending = Torchrun()(Job(FSDP2_SCRIPT, flags, options.processes, logs, _TIMEOUT_S))
    if ending.exit_code != 0:
        raise RuntimeError(f"{precision}, seed {seed}: {explain(ending)['reason']}")
    lines = (folder / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measure_held_out(model: Path, held_out: Path) -> float:
    """Return the held-out loss of a saved model, in a process of its own."""
    command = [sys.executable, "-m", "megablocks_utils.evaluate", str(model)]
    command += ["--data_path", str(held_out), "--max_seq_length", "160"]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])["loss"]


def thin_out(source: Path, num_examples: int, target: Path) -> None:
    """Write `num_examples` records spread evenly over a JSON file."""
    records = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(json.dumps(records[:: max(1, len(records) // num_examples)][:num_examples]))


def run_study(options: argparse.Namespace) -> dict:
    """Run every precision with every seed and return the result as written to disk."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=Console(stderr=True)) as bar:
        held_out = Path(scratch) / "held_out.json"
        thin_out(options.held_out, options.num_held_out, held_out)
        start = measure_held_out(options.model, held_out)
        task = bar.add_task("runs", total=len(PRECISIONS) * len(options.seeds))
        for seed in options.seeds:
            for precision in PRECISIONS:
                with tempfile.TemporaryDirectory(dir=scratch) as name:
                    metrics = run_training(options, precision, seed, Path(name))
                    loss = measure_held_out(Path(name, "output"), held_out)
                step_time_s = statistics.median(step["step_time_s"] for step in metrics)
                rows.append(
                    {
                        "precision": precision,
                        "seed": seed,
                        "held_out_loss": loss,
                        "fall": start - loss,
                        "train_losses": [step["loss"] for step in metrics],
                        "median_step_time_s": step_time_s,
                        "mem_peak_bytes": metrics[-1]["mem_peak_bytes"],
                    }
                )
                bar.advance(task)
    return {"held_out_loss_before": start, "rows": rows}


def write_table(result: dict) -> str:
    """Return the Markdown table of a result."""
    columns = ("precision", "held-out loss after", "fall, mean (min to max)", "peak memory")
    lines = []
    for precision in PRECISIONS:
        rows = [row for row in result["rows"] if row["precision"] == precision]
        falls = [row["fall"] for row in rows]
        peak_gib = max(row["mem_peak_bytes"] for row in rows) / GIB
        lines.append(
            (
                f"`{precision}`",
                ", ".join(f"{row['held_out_loss']:.3f}" for row in rows),
                f"{statistics.mean(falls):.3f} ({min(falls):.3f} to {max(falls):.3f})",
                f"{peak_gib:.2f} GiB",
            )
        )
    return markdown_table(columns, lines, num_left=4)


def main(argv: list[str]) -> None:
    """Run the study, write its JSON and print its table."""
    options = build_parser().parse_args(argv)
    result = run_study(options)
    Record(RESULT, build_provenance("benchmarks.precision", argv) | result).write()
    show(f"held-out loss before: {result['held_out_loss_before']:.3f}")
    show(write_table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
