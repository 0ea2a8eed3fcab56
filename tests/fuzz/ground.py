"""What is mutated: a tiny model, its data, a checkpoint and an adapter; and the runs on them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BASES", "INPUTS", "Base", "build_inputs", "command_words", "input_path"]

NUM_STEPS = 2
SAVED_RUN = "run"
INPUTS = {
    "model": "model",
    "tokens": "tokens.jsonl",
    "alpaca": "alpaca.jsonl",
    "chat": "chat.jsonl",
    "config": "model/config.json",
    "checkpoint": f"{SAVED_RUN}/checkpoint-1",
    "record": f"{SAVED_RUN}/run.json",
    "adapter": "adapter",
}
"""Inputs by name, below the folder of the ground."""

_TRAIN = "--max_steps 1 --per_device_train_batch_size 2 --precision fp32 --output_dir {out}"
_MODEL = "--model_name_or_path {model}"


@dataclass(frozen=True)
class Base:
    """Describe a run that ends well.

    Attributes:
        command: `fsdp2`, `fsdp1` or a module of the package.
        words: of its command line, with inputs in braces.
        read_result: reads what came of it from the output folder and standard output.
    """

    command: str
    words: str
    read_result: Callable[[Path, str], Any]


def _read_metrics(out: Path, _stdout: str) -> list[tuple[float, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [(step["loss"], step["grad_norm"]) for step in steps if "loss" in step]


def _read_loss(_out: Path, stdout: str) -> float:
    return json.loads(stdout)["loss"]


def _read_weights(out: Path, _stdout: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(out / "model.safetensors")
    return {name: tensor.double().abs().sum().item() for name, tensor in sorted(tensors.items())}


def _read_plan(out: Path, _stdout: str) -> list[Any]:
    rows = json.loads(out.read_text())["rows"]
    return [(row["ep_size"], row["peak_bytes"], row["verdict"]) for row in rows]


def _read_text(_out: Path, stdout: str) -> str:
    return stdout


BASES = {
    "train": Base("fsdp2", f"{_MODEL} --data_path {{tokens}} {_TRAIN}", _read_metrics),
    "alpaca": Base("fsdp2", f"{_MODEL} --data_path {{alpaca}} {_TRAIN}", _read_metrics),
    "chat": Base("fsdp2", f"{_MODEL} --data_path {{chat}} {_TRAIN}", _read_metrics),
    "fsdp1": Base("fsdp1", f"{_MODEL} --data_path {{tokens}} {_TRAIN}", _read_metrics),
    "resume": Base(
        "fsdp2",
        f"{_MODEL} --data_path {{tokens}} --resume_from_checkpoint {{checkpoint}} "
        f"{_TRAIN.replace('max_steps 1', f'max_steps {NUM_STEPS}')}",
        _read_metrics,
    ),
    "adapter": Base(
        "fsdp2",
        f"{_MODEL} --data_path {{tokens}} --use_lora all --resume_adapter {{adapter}} "
        f"--verify_adapter False {_TRAIN}",
        _read_metrics,
    ),
    "evaluate": Base("evaluate", "{model} --data_path {tokens}", _read_loss),
    "evaluate alpaca": Base("evaluate", "{model} --data_path {alpaca}", _read_loss),
    "evaluate adapter": Base(
        "evaluate", "{model} --data_path {tokens} --adapter {adapter}", _read_loss
    ),
    "merge": Base("merge", f"--adapter {{adapter}} --output {{out}} {_MODEL}", _read_weights),
    "export": Base("export", "--checkpoint {checkpoint} --output {out}", _read_weights),
    "plan": Base("plan", "{config} --gpus 8 --gpu a100-80g --json {out}", _read_plan),
    "check": Base("plan", "--check {record}", _read_text),
}


def input_path(ground: Path, name: str) -> Path:
    """Return where an input lies."""
    return ground / INPUTS[name]


def command_words(base: Base, replacing: Sequence[str], places: dict[str, str]) -> list[str]:
    """Return the words of a base's command line, options that are given again left out."""
    given = {word.partition("=")[0] for word in replacing if word.startswith("--")}
    words, is_kept = [], True
    for word in base.words.split():
        is_kept = word not in given if word.startswith("--") else is_kept
        if is_kept:
            words.append(word.format(**places))
    return [*words, *replacing]


def build_inputs(folder: Path, run: Callable[[str, Sequence[str]], None]) -> None:
    """Make all inputs.

    Args:
        folder: for them.
        run: runs a command with these words in a process of its own.
    """
    run("_make", [str(folder)])
    model = ["--model_name_or_path", str(folder / "model"), "--precision", "fp32"]
    common = [*model, "--data_path", str(folder / "tokens.jsonl")]
    common += ["--per_device_train_batch_size", "2"]
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", str(NUM_STEPS)]
    run("fsdp2", [*common, *saving, "--output_dir", str(folder / SAVED_RUN)])
    lora = ["--use_lora", "all", "--lora_r", "4", "--verify_adapter", "False", "--max_steps", "1"]
    run("fsdp2", [*common, *lora, "--output_dir", str(folder / "adapter")])


def make_model_and_data(words: Sequence[str]) -> None:
    """Write the tiny model, its tokenizer and the data."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.support.tiny_tokenizer import tiny_tokenizer

    (folder,) = map(Path, words)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    MixtralForCausalLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tokens = [[(7 * n + 3 * k) % 400 for k in range(6 + n)] for n in range(8)]
    _write_lines(folder / "tokens.jsonl", [{"input_ids": t, "labels": t} for t in tokens])
    turns = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(8)]
    _write_lines(folder / "alpaca.jsonl", turns)
    _write_lines(
        folder / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": turn["instruction"]},
                    {"role": "assistant", "content": turn["output"]},
                ]
            }
            for turn in turns
        ],
    )


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
