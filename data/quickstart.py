"""Watch a real MoE learn: build model and data, fine-tune with expert parallelism, compare.

Everything built is kept in ``data/.cache`` and found again by the next run. In the environment,
``FULL=1`` trains all weights instead of LoRA adapters on attention and experts, and
``MODEL=granitemoe`` a model of another family than Mixtral's, and ``QUANT=nf4`` (or another format)
keeps the frozen experts in few bits.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import prepare_docs
import prepare_model
from preparing import CACHE, PreparationError, exit_code_of, say, write_json

ROOT = Path(__file__).resolve().parents[1]
TRAIN_DATA = CACHE / "docs_train.json"
HELD_OUT_DATA = CACHE / "quickstart_held_out.json"
NUM_EXPERTS = 4
NUM_HELD_OUT = 16
CPU_PROCESSES = 2
GLOBAL_BATCH = 4
MAX_STEPS = 16
MAX_SEQ_LENGTH = 160
METHODS = {
    "LoRA": ["--use_lora", "all", "--lora_r", "16", "--learning_rate", "1e-3"],
    "full": ["--use_lora", "none", "--learning_rate", "1e-4"],
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Set FULL=1 in the environment for full fine-tuning instead of LoRA, and "
        f"MODEL to {' or '.join(prepare_model.MOE_BLOCKS)}.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("results/quickstart"))
    parser.add_argument("--seed", type=int, default=42, help="of the training order")
    return parser


def choose_family() -> str:
    """Return the family that MODEL in the environment names.

    Raises:
        PreparationError: there is no such family here.
    """
    family = os.environ.get("MODEL") or "mixtral"
    if family not in prepare_model.MOE_BLOCKS:
        names = " or ".join(prepare_model.MOE_BLOCKS)
        raise PreparationError(f"MODEL is {family}, but it must be {names}")
    return family


def model_folder(family: str) -> Path:
    """Return where the model of a family is built."""
    return CACHE / ("smollm2-moe" if family == "mixtral" else f"smollm2-{family}")


def prepare_inputs(family: str) -> str:
    """Build model and data unless they are there; return the question to ask.

    The held-out examples are spread evenly over the held-out modules, and the question is one more
    of them: its module was never trained on.
    """
    words = ["--family", family, "--output", str(model_folder(family))]
    prepare_model.prepare(prepare_model.build_parser().parse_args(words))
    if not TRAIN_DATA.exists():
        prepare_docs.prepare(CACHE)
    held_out = json.loads((CACHE / "docs_held_out.json").read_text(encoding="utf-8"))
    stride = len(held_out) // (NUM_HELD_OUT + 1)
    chosen = held_out[:: max(1, stride)][: NUM_HELD_OUT + 1]
    write_json(HELD_OUT_DATA, chosen[1:])
    return chosen[0]["instruction"]


def evaluate(question: str, *, model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Return held-out loss and answer of a saved model, from plain transformers in its own process.

    Raises:
        PreparationError: the evaluation failed (it has said why).
    """
    command = [sys.executable, "-m", "megablocks_utils.evaluate", str(model)]
    command += ["--data_path", str(HELD_OUT_DATA), "--max_seq_length", str(MAX_SEQ_LENGTH)]
    command += ["--ask", question, "--max_new_tokens", "32"]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise PreparationError(f"evaluating {adapter or model} failed")
    return json.loads(result.stdout.splitlines()[-1])


def training_command(
    num_processes: int, method: str, model: Path, options: argparse.Namespace
) -> list[str]:
    """Return the torchrun command of the training run."""
    sizes = {
        # Neighbouring ranks share the experts; with 8 GPUs and 4 experts there are two groups.
        "--ep_size": math.gcd(num_processes, NUM_EXPERTS),
        "--per_device_train_batch_size": max(1, GLOBAL_BATCH // num_processes),
        "--gradient_accumulation_steps": 1,
        "--max_steps": MAX_STEPS,
        "--max_seq_length": MAX_SEQ_LENGTH,
        "--logging_steps": 1,
        "--expert_load_steps": 1,
        "--eval_data_path": HELD_OUT_DATA,
        "--eval_strategy": "steps",
        "--eval_steps": MAX_STEPS // 2,
        "--seed": options.seed,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={num_processes}", "train_accelerate_fsdp2.py"]
    command += ["--model_name_or_path", str(model), "--data_path", str(TRAIN_DATA)]
    command += ["--output_dir", str(options.output_dir), "--overwrite_output_dir", "True"]
    command += ["--use_megablocks_sharding", "True", *METHODS[method]]
    if quantization := os.environ.get("QUANT"):
        command += ["--expert_quantization", quantization]
    return command + [text for pair in sizes.items() for text in map(str, pair)]


def train(num_processes: int, method: str, model: Path, options: argparse.Namespace) -> float:
    """Run the training; return its wall time in seconds.

    Raises:
        PreparationError: it ended with an error (and has said why).
    """
    command = training_command(num_processes, method, model, options)
    say("$ " + " ".join(["python", *command[1:]]))
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    start = time.monotonic()
    result = subprocess.run(command, env=environment, check=False)
    if result.returncode != 0:
        raise PreparationError(f"the training run ended with exit code {result.returncode}")
    return time.monotonic() - start


def count_processes() -> int:
    """Return the number of GPUs, or two CPU processes where there is none."""
    import torch

    return torch.cuda.device_count() or CPU_PROCESSES


def show(before: dict[str, Any], after: dict[str, Any], losses: list[float], title: str) -> None:
    """Print what has changed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_lines=True)
    for column in ("", "before", "after"):
        table.add_column(column)
    table.add_row("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
    table.add_row("training loss", f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    for question, answer in before["answers"].items():
        # Text, not markup: answers may hold square brackets.
        table.add_row(Text(question), Text(answer), Text(after["answers"][question]))
    Console().print(table)


def write_report(folder: Path) -> None:
    """Make the page of the run and say where it is.

    Raises:
        PreparationError: it failed (and has said why).
    """
    command = [sys.executable, "-m", "megablocks_utils.report", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise PreparationError(f"the report of {folder} failed")
    say(f"the whole run on one page: {Path(result.stdout.strip()).resolve()}")


def quickstart(options: argparse.Namespace) -> None:
    """Prepare, measure, train, measure, compare."""
    family = choose_family()
    question, model = prepare_inputs(family), model_folder(family)
    method = "full" if os.environ.get("FULL") == "1" else "LoRA"
    num_processes = count_processes()
    say("measuring the model before training ...")
    before = evaluate(question, model=model)
    seconds = train(num_processes, method, model, options)
    say("measuring the model after training ...")
    if method == "LoRA":
        after = evaluate(question, model=model, adapter=options.output_dir)
    else:
        after = evaluate(question, model=options.output_dir)
    lines = (options.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    title = (
        f"{family}, {method}, {len(losses)} steps on {num_processes} processes in {seconds:.0f} s"
    )
    show(before, after, losses, title)
    write_report(options.output_dir)


def main(argv: list[str] | None = None) -> int:
    """Run the command line from the repository's root; return its exit code."""
    options = build_parser().parse_args(argv)
    os.chdir(ROOT)
    return exit_code_of(lambda: quickstart(options))


if __name__ == "__main__":
    sys.exit(main())
