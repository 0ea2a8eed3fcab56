"""How far off packed experts are: their weights, what they compute, and the loss of a real model.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.quantization_error

Weights and outputs are of the first layers' experts of the small real model, and of one layer with
Mixtral's shape and normal weights, whose tokens are normal too. The loss is the held-out loss of
the small model before any training, all of its experts rounded.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from benchmarks.harness.provenance import RESULTS, ROOT, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import markdown_table, show
from megablocks_utils.checkpoint.tokenizer import load_tokenizer
from megablocks_utils.config import DataConfig
from megablocks_utils.config.quantization import NO_QUANTIZATION, count_packed_bytes
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.rounded_experts import round_experts
from megablocks_utils.quantization.format_table import FORMATS, round_to_format
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.plain_model import held_out_loss, load_model

RESULT = RESULTS / "quantization_error_cpu.json"
MIXTRAL_SIZES = (14336, 4096)
_TOKENS, _LAYERS = 32, 3


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "data/.cache/smollm2-moe")
    parser.add_argument("--data", type=Path, default=ROOT / "data/.cache/quickstart_held_out.json")
    return parser


def relative_error(seen: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference by the norm of what is wanted."""
    return ((seen - wanted).norm() / wanted.norm()).item()


def measure_experts(experts: list[tuple[Tensor, Tensor]], name: str) -> Row:
    """Return the errors of experts without gates of their own: (2 * inner, in) and (in, inner)."""
    weights, outputs, packed_bytes, num_weights = [], [], 0, 0
    for gate_up, down in experts:
        tokens = torch.randn(_TOKENS, gate_up.shape[1])
        rounded = [round_to_format(matrix, FORMATS[name]) for matrix in (gate_up, down)]
        for seen, wanted in zip(rounded, (gate_up, down), strict=True):
            weights.append(relative_error(seen, wanted))
            packed_bytes += count_packed_bytes(name, *wanted.shape)
            num_weights += wanted.numel()
        outputs.append(relative_error(_run(tokens, *rounded), _run(tokens, gate_up, down)))
    return {
        "weights": mean(weights),
        "outputs": mean(outputs),
        "bytes_per_weight": packed_bytes / num_weights,
    }


def _run(tokens: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (tokens @ gate_up.T).chunk(2, dim=1)
    return (nn.functional.silu(gate) * up) @ down.T


def draw_mixtral() -> list[tuple[Tensor, Tensor]]:
    """Return one expert of Mixtral's sizes with normal weights."""
    inner, hidden = MIXTRAL_SIZES
    return [(torch.randn(2 * inner, hidden) * 0.02, torch.randn(hidden, inner) * 0.02)]


@torch.no_grad()
def run_study(options: argparse.Namespace, record: Record) -> None:
    """Measure every format."""
    torch.manual_seed(0)
    data = DataConfig((str(options.data),), max_seq_length=160)
    examples = load_examples(data, load_tokenizer(options.model))
    mixtral = draw_mixtral()
    for name in (NO_QUANTIZATION, *FORMATS):
        model = load_model(str(options.model), None)
        row: Row = {"format": name}
        if name != NO_QUANTIZATION:
            modules = list(find_expert_modules(model).values())[:_LAYERS]
            real = [
                (gate_up.float(), down.float())
                for module in modules
                for gate_up, down in zip(
                    module.get_parameter("gate_up_proj"),
                    module.get_parameter("down_proj"),
                    strict=True,
                )
            ]
            row["real"] = measure_experts(real, name)
            row["mixtral"] = measure_experts(mixtral, name)
            round_experts(model, name)
        row["held_out_loss"] = held_out_loss(model, examples)
        record.add(row, "format")


def write_table(rows: list[Row]) -> str:
    """Return the Markdown table of a result."""
    columns = (
        "format",
        "bytes a weight",
        "weights, real",
        "outputs, real",
        "weights, Mixtral's shape",
        "outputs, Mixtral's shape",
        "held-out loss",
    )
    lines = []
    for row in rows:
        cells = [""] * 5
        if "real" in row:
            real, mixtral = row["real"], row["mixtral"]
            cells = [f"{mixtral['bytes_per_weight']:.3f}"]
            cells += [f"{of[key]:.2%}" for of in (real, mixtral) for key in ("weights", "outputs")]
        lines.append((f"`{row['format']}`", *cells, f"{row['held_out_loss']:.3f}"))
    return markdown_table(columns, lines)


def main(argv: list[str]) -> None:
    """Run the study, write its JSON and print its table."""
    options = build_parser().parse_args(argv)
    record = Record(RESULT, build_provenance("benchmarks.quantization_error", argv))
    run_study(options, record)
    show(write_table(record.rows))


if __name__ == "__main__":
    main(sys.argv[1:])
