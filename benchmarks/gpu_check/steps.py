"""Part 5: traces of steps, attention over packed rows, and the optimizer's kernel."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu_check.dry_run import DRY_WORKLOAD
from benchmarks.gpu_check.part import Part, WrongFigureError
from benchmarks.gpu_check.programs import Finished, Program, name_folder
from benchmarks.harness.processes import as_words
from benchmarks.harness.record import Record, Row
from benchmarks.harness.workload import Workload, save_equal_examples, save_model

_SIZES = Workload(
    hidden_size=2048, intermediate_size=5632, num_layers=4, vocab_size=32000, num_attention_heads=16
)
_TOKENS, _DRY_TOKENS = 256, 16
_COUNT = 1024
_FULL: Mapping[str, str] = MappingProxyType({"precision": "bf16_sr", "use_lora": "none"})
_LORA: Mapping[str, str] = MappingProxyType({"precision": "mixed", "use_lora": "all"})
_TRACES: Mapping[str, tuple[Mapping[str, str], int, int]] = MappingProxyType(
    {
        "full, 64 examples a micro-batch": (_FULL, 64, 1),
        "full, 1 example a micro-batch": (_FULL, 1, 4),
        "lora all, 64 examples a micro-batch": (_LORA, 64, 1),
        "lora all, 1 example a micro-batch": (_LORA, 1, 4),
        "full, 1 example a micro-batch, compiled": ({**_FULL, "compile": "True"}, 1, 4),
    }
)
"""Options, examples of a micro-batch and micro-batches of a step, by name."""
_DRY_TRACES: Mapping[str, tuple[Mapping[str, str], int, int]] = MappingProxyType(
    {"lora all, 2 examples a micro-batch": ({**_LORA, "precision": "fp32"}, 2, 2)}
)
_TIMEOUT_S = 180.0
_MOST_ERROR: Mapping[str, float] = MappingProxyType({"attention": 0.05, "step of a model": 0.3})
"""Of gradients in bfloat16 against another way to sum the same: in a model, some tokens then go to
other experts. A wrong mask is off by about 1."""


def run(part: Part) -> None:
    """Trace, then measure attention and optimizer alone."""
    device = part.options.device
    traces = _DRY_TRACES if part.is_dry else _TRACES
    if any(part.is_wanted(_name(title)) for title in traces):
        _save(part)
    programs = [_trace(part, title, *traces[title]) for title in traces]
    part.run(programs, lambda finished: _read_trace(finished, is_dry=part.is_dry))
    path = part.output / f"packed_attention_{device}.json"
    sizes = {"examples": 2, "tokens": 16, "rounds": 1} if part.is_dry else {}
    words = as_words({**sizes, "device": device, "output": path})
    attention = _program(part, "packed attention", "benchmarks.packed_attention", words)
    part.run([attention], lambda _: _read_attention(Record.read(path)))
    rate = _program(part, "optimizer", "benchmarks.gpu_check.optimizer_rate", [device])
    part.run([rate], _read_figures)


def _save(part: Part) -> None:
    sizes = DRY_WORKLOAD if part.is_dry else _SIZES
    dtype = torch.float32 if part.is_dry else torch.bfloat16
    save_model(sizes.build_config(), part.scratch / "model", dtype=dtype)
    save_equal_examples(
        part.scratch / "data.jsonl",
        vocab_size=sizes.vocab_size,
        tokens=_DRY_TOKENS if part.is_dry else _TOKENS,
        count=_COUNT,
    )


def _trace(
    part: Part, title: str, usual: Mapping[str, str], batch_size: int, accumulation: int
) -> Program:
    options: dict[str, Any] = {
        "model_name_or_path": part.scratch / "model",
        "data_path": part.scratch / "data.jsonl",
        "output_dir": part.scratch / "trace",
        "use_megablocks_sharding": True,
        "ep_size": 1,
        "kernel": "grouped_mm" if part.is_dry else "triton",
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": "selective",
        "max_steps": 20,
        **usual,
    }
    path = part.output / f"trace_{name_folder(title)}.json.gz"
    words = [str(path), *as_words(options)]
    return _program(part, _name(title), "benchmarks.gpu_check.trace_step", words)


def _name(title: str) -> str:
    return f"trace: {title}"


def _program(part: Part, name: str, module: str, words: list[str]) -> Program:
    return Program(name, ("-m", module, *words), _TIMEOUT_S, hides_gpu=part.is_dry)


def _read_figures(finished: Finished) -> Row:
    found: Row = json.loads(finished.output().splitlines()[-1])
    return found


def _read_trace(finished: Finished, *, is_dry: bool) -> Row:
    """Read the figures of a trace.

    Raises:
        WrongFigureError: a GPU's trace holds no kernels.
    """
    found = _read_figures(finished)
    if found["device"] is None and not is_dry:
        raise WrongFigureError(
            "the trace holds no kernels: the profiler cannot see this GPU", found
        )
    return found


def _read_attention(record: Record) -> Row:
    rows = {row["part"]: row for row in record.rows}
    for name, row in rows.items():
        if not row["gradient_error"] <= _MOST_ERROR[name]:
            reason = f"{name}: gradients are off by {row['gradient_error']:.1e}"
            raise WrongFigureError(f"{reason}, but it may be {_MOST_ERROR[name]}", {"parts": rows})
    return {"parts": rows}
