"""Attention of packed rows: blocks of examples (`varlen`) against a mask of all tokens by all.

Both see the same row of examples. First the attention alone, forward and backward, with the mask
made in the step as a model makes it; then a step of a small Mixtral without its optimizer.

    python -m benchmarks.packed_attention                  (about 6 minutes of one core)
    python -m benchmarks.packed_attention --device cuda    (in bfloat16)
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.harness.memory import describe_method, measure_peak_bytes
from benchmarks.harness.provenance import RESULTS, build_provenance, describe_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, markdown_table, say, show
from benchmarks.harness.timing import compare, take_turns
from megablocks_utils.attention.implementation import set_implementation
from megablocks_utils.attention.varlen_interface import VARLEN, example_lengths
from megablocks_utils.byte_units import MIB
from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_encoded
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss

DENSE = "sdpa"
_VOCABULARY = 512
Step = Callable[[], object]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of an example")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", help="JSON file; none: not written")
    return parser


def build_model(device: torch.device) -> MixtralForCausalLM:
    """Build a random Mixtral of two layers, 256 wide, with 4 heads over 2 of keys.

    In float32 on a CPU, in bfloat16 on a GPU.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MixtralForCausalLM(config)
    nn.Module.to(model, device, dtype)
    return model


def build_batch(num_examples: int, num_tokens: int) -> MicroBatch:
    """Return a row of examples of one length."""
    generator = np.random.RandomState(0)
    rows = [generator.randint(3, _VOCABULARY, num_tokens) for _ in range(num_examples)]
    return collate_encoded([(row, row) for row in rows], Packing.POSITIONS)


def attention_step(model: MixtralForCausalLM, batch: MicroBatch, name: str) -> Step:
    """Return a step of the attention alone, on random queries, keys and values."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    num_tokens, size = batch.input_ids.shape[1], _head_size(config)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    rows = [torch.randn((1, num_tokens, n, size), generator=generator) for n in heads]
    device, dtype = model.device, model.dtype
    inputs = [row.to(device, dtype).transpose(1, 2).requires_grad_() for row in rows]
    embeddings = torch.empty(1, num_tokens, 0, device=device, dtype=dtype)
    module = _attention_module(model)
    position_ids = None if batch.position_ids is None else batch.position_ids.to(model.device)

    def step() -> list[Tensor]:
        set_implementation(model, name)
        function = ALL_ATTENTION_FUNCTIONS[name]
        with example_lengths(batch.row_lengths):
            mask = create_causal_mask(config, embeddings, None, None, position_ids=position_ids)
        output, _ = function(module, *inputs, mask, scaling=size**-0.5, dropout=0.0)
        return list(torch.autograd.grad(output.sum(), inputs))

    return step


def _head_size(config: MixtralConfig) -> int:
    return config.hidden_size // config.num_attention_heads


def _attention_module(model: MixtralForCausalLM) -> nn.Module:
    return model.get_submodule("model.layers.0.self_attn")


def model_step(model: MixtralForCausalLM, batch: MicroBatch, name: str) -> Step:
    """Return a forward and backward pass of the model."""
    weights = LossWeights(int((batch.labels >= 0).sum()), 1)

    def step() -> list[Tensor]:
        set_implementation(model, name)
        loss = compute_micro_batch_loss(model, batch, weights, model.device)
        return list(torch.autograd.grad(loss.objective, list(model.parameters())))

    return step


def measure(part: str, steps: dict[str, Step], rounds: int, device: torch.device) -> Row:
    """Compare both in gradients, memory and time."""
    say(f"{part}: gradients and memory")
    ours, dense = (steps[name]() for name in (VARLEN, DENSE))
    assert isinstance(ours, list)
    assert isinstance(dense, list)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, dense, strict=True))
    peaks = {name: measure_peak_bytes(step, device) for name, step in steps.items()}
    say(f"{part}: time")
    times, num_steps = take_turns(steps, device, rounds=rounds, least_turn_s=0.0)
    return {
        "part": part,
        "gradient_error": error,
        "peak_bytes": peaks,
        "peak_ratio": peaks[DENSE] / peaks[VARLEN],
        "steps_a_turn": num_steps,
        **compare(times, VARLEN, DENSE),
    }


def write_table(record: Record) -> str:
    """Return the result as Markdown."""
    is_cuda = record.content["device"] == "cuda"
    time, ratio = ("wall_s", "ratio") if is_cuda else ("cpu_s", "ratio_of_cpu_time")
    unit, dtype = ("s", "bfloat16") if is_cuda else ("CPU s", "fp32, one thread")
    columns = ("part", f"{unit}, varlen", f"{unit}, sdpa", "ratio", "peak MiB, varlen", "sdpa")
    cells = []
    for row in record.rows:
        seconds, peaks = row[time], row["peak_bytes"]
        cells.append(
            (
                row["part"],
                format_spread(seconds[VARLEN]),
                format_spread(seconds[DENSE]),
                format_spread(row[ratio], 1, is_bold=True),
                f"{peaks[VARLEN] / MIB:.0f}",
                f"{peaks[DENSE] / MIB:.0f}",
                f"**{row['peak_ratio']:.1f}**",
            )
        )
    head = (
        f"# Packed attention\n\nOne row of {record.content['examples']} examples of "
        f"{record.content['tokens']} tokens, {dtype}. "
        f"{describe_provenance(record.content)}"
    )
    worst = max(row["gradient_error"] for row in record.rows)
    tail = f"The gradients of both differ by {worst:.0e} at most (relative norm)."
    return f"{head}\n\n{markdown_table((*columns, 'ratio'), cells)}\n\n{tail}\n"


def main(argv: Sequence[str]) -> int:
    """Measure both parts and write the result."""
    options = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in ("device", "examples", "tokens")}
    provenance = build_provenance("benchmarks.packed_attention", argv, **settings)
    output = options.output or str(RESULTS / f"packed_attention_{device.type}.json")
    path = None if output == "none" else Path(output)
    record = Record(path, provenance | {"method": describe_method(device)})
    model, batch = build_model(device), build_batch(options.examples, options.tokens)
    for part, build in (("attention", attention_step), ("step of a model", model_step)):
        steps = {name: build(model, batch, name) for name in (VARLEN, DENSE)}
        record.add(measure(part, steps, options.rounds, device), "part")
    table = write_table(record)
    if record.path is not None:
        record.path.with_suffix(".md").write_text(table, encoding="utf-8")
    show(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
