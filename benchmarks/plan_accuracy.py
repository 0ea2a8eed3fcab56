"""The plan against memory: formulas, rehearsal, and what a real step took of a CPU's memory.

    PYTHONPATH=. python -m benchmarks.plan_accuracy

Each case is one optimizer step of a Mixtral with hidden size 1024 and four layers on rank 0 of
eight in a fake process group: real tensors, real kernels and optimizer, collectives that return at
once. Its peak is the process's (VmHWM, reset before the first micro-step) less what the process
held when the model had no weights yet. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.provenance import build_provenance
from megablocks_utils.config.precision import PrecisionConfig, resolve_preset
from megablocks_utils.files import write_json_atomically
from megablocks_utils.planning.memory.formula import predict
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun
from megablocks_utils.rehearsal.worker import build_request, read_request, rehearse_apart

RESULTS = Path(__file__).parent / "results" / "plan_accuracy_cpu.json"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
# Above it, glibc gives every block back to the system when it is freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass(frozen=True)
class Case:
    """One run; what is not said is as in `build_run`."""

    layout: ParallelLayout
    changes: dict[str, Any]

    def label(self) -> str:
        """Name it."""
        changes = ", ".join(f"{name} {value}" for name, value in self.changes.items())
        return f"{self.layout.describe()}; {changes or 'full, fp32'}"


NONE, WHOLE = ParallelLayout(1, "shard"), ParallelLayout(8, "shard")
SHARD, COPIES = ParallelLayout(4, "shard"), ParallelLayout(4, "replicate")
CASES = (
    Case(NONE, {}),
    Case(WHOLE, {}),
    Case(SHARD, {}),
    Case(COPIES, {}),
    Case(SHARD, {"gradient_checkpointing": "none"}),
    Case(SHARD, {"gradient_checkpointing": "selective"}),
    Case(WHOLE, {"gradient_checkpointing": "none", "examples": 4}),
    Case(NONE, {"use_lora": "attn-only"}),
    Case(WHOLE, {"use_lora": "attn-only", "gradient_checkpointing": "none"}),
    Case(SHARD, {"use_lora": "all"}),
    Case(COPIES, {"entry_point": "fsdp1"}),
)


def build_run(**changes: Any) -> PlannedRun:
    """Return a run of 1024 tokens, two micro-steps and fp32, changed."""
    lora = changes.get("use_lora", "none")
    run = PlannedRun(
        world_size=8,
        entry_point="fsdp2",
        precision=resolve_preset(
            PrecisionConfig("fp32"), has_lora=lora != "none", device_type="cpu"
        ),
        use_lora=lora,
        lora_r=16,
        gradient_checkpointing="full",
        accumulation=2,
        sync_each_batch=lora == "none",
        tokens=1024,
        label_tokens=1024,
        kernel="grouped_mm",
        imbalance=1.0,
        has_aux_loss=False,
        device_type="cpu",
    )
    return replace(run, **changes)


def measure(request: str) -> int:
    """Take a real step; the bytes that the process held at its peak."""
    import torch

    from megablocks_utils.rehearsal.rehearse import rehearse

    held: dict[str, int] = {}
    folder, layout, run = read_request(request)
    rehearse(
        folder,
        layout,
        run,
        device=torch.device("cpu"),
        is_real=True,
        on_wrapped=lambda: held.update(base=_read("VmRSS")),
        on_ready=_reset_peak,
    )
    return _read("VmHWM") - held["base"]


def measure_apart(folder: Path, case: Case, rounds: int) -> list[int]:
    """Measure in processes of their own."""
    request = build_request(folder, case.layout, build_run(**case.changes))
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--child"]
    environment = os.environ | ENVIRONMENT
    return [
        int(subprocess.check_output(command, input=request, text=True, env=environment))
        for _ in range(rounds)
    ]


def build_row(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Predict and measure one case."""
    run = build_run(**case.changes)
    formula = predict(ModelShape.from_config(CONFIG), case.layout, run)
    fake = rehearse_apart(folder, case.layout, run)
    measured = measure_apart(folder, case, rounds)
    return {
        "case": case.label(),
        "layout": asdict(case.layout),
        "changes": case.changes,
        "formula_bytes": formula.peak_bytes,
        "fake_bytes": fake.peak_bytes,
        "measured_bytes": measured,
        "fake_error": fake.peak_bytes / median(measured) - 1,
        "formula_error": formula.peak_bytes / median(measured) - 1,
        "formula_against_fake": formula.peak_bytes / fake.peak_bytes - 1,
    }


def table_line(row: dict[str, Any]) -> str:
    """Return a line of the Markdown table in `benchmarks/results/plan_accuracy_cpu.md`."""
    measured = row["measured_bytes"]
    cells = [
        row["case"],
        *(f"{row[name] / 1e9:.3f}" for name in ("formula_bytes", "fake_bytes")),
        f"{median(measured) / 1e9:.3f} ({min(measured) / 1e9:.3f}-{max(measured) / 1e9:.3f})",
        *(f"{100 * row[name]:+.1f} %" for name in ("formula_error", "fake_error")),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str]) -> None:
    """Measure all cases and write the JSON file."""
    options = _parse(argv)
    if options.child:
        sys.stdout.write(f"{measure(sys.stdin.read())}\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for case in CASES:
            rows.append(build_row(case, folder, options.rounds))
            sys.stdout.write(table_line(rows[-1]) + "\n")
            sys.stdout.flush()
    provenance = build_provenance("benchmarks.plan_accuracy", argv, n=options.rounds)
    write_json_atomically(options.output, provenance | {"config": CONFIG, "rows": rows})


def _reset_peak() -> None:
    RESET.write_text(RESET_PEAK)


def _read(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="real steps of each case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
