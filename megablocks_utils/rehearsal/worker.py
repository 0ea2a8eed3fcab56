"""Rehearse in a process of its own: a question a line on standard input, an answer a line.

python -m megablocks_utils.rehearsal.worker < questions
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from megablocks_utils.config import ResolvedPrecision, RunConfig
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.planning.model.model_description import (
    ModelDescription,
    read_description,
    write_description,
)
from megablocks_utils.planning.model.prediction import (
    GroupTraffic,
    ParallelLayout,
    PlannedRun,
    Prediction,
)
from megablocks_utils.processes.entry_point import run_entry_point

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RehearsalWorker", "build_request", "main", "read_request", "rehearse_apart"]


_REHEARSED_KERNELS = ("grouped_mm", "triton")
"""The others are taken for the first one, as the formulas do."""


class RehearsalWorker:
    """A process that builds models on meta and rehearses; it starts with the first question.

    Use it as a context: it ends with it.

    Args:
        folder: holds the model's config.json; weights are not read.
        truncate_layers: keep only that many first layers.
    """

    def __init__(self, folder: Path, *, truncate_layers: int | None = None) -> None:
        self._asked = {"folder": str(folder), "truncate_layers": truncate_layers}
        self._process: subprocess.Popen[str] | None = None
        self._rehearsed: dict[tuple[ParallelLayout, PlannedRun], Prediction] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def describe(self) -> ModelDescription:
        """Say what the model is.

        Raises:
            ConfigurationError: it cannot be built, with the sentence that says why.
        """
        return read_description(self._ask(self._asked))

    def choose_packing(self, config: RunConfig) -> tuple[str, bool]:
        """Say how a run would lay out the examples of a micro-batch, by the probe that it makes.

        Returns:
            The layout, and whether attention is `varlen`.

        Raises:
            ConfigurationError: the run would be refused, with its sentence.
        """
        parts = {
            "packing": config.optim.packing,
            "batch_size": config.optim.per_device_train_batch_size,
            "attention": config.model.attn_implementation,
            "packing_length": config.data.packing_length,
        }
        answer = self._ask(self._asked | parts)
        return str(answer["packing"]), bool(answer["is_varlen"])

    def rehearse(self, layout: ParallelLayout, run: PlannedRun) -> Prediction:
        """Rehearse one layout with few layers of each kind, once.

        Raises:
            ConfigurationError: it cannot be, with the sentence that says why.
        """
        kernel = run.kernel if run.kernel in _REHEARSED_KERNELS else _REHEARSED_KERNELS[0]
        run = replace(run, kernel=kernel)
        if (layout, run) not in self._rehearsed:
            parts = {"layout": asdict(layout), "run": asdict(run)}
            self._rehearsed[layout, run] = _read_prediction(self._ask(self._asked | parts))
        return self._rehearsed[layout, run]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{json.dumps(question)}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            assert process.stderr is not None
            lines = process.stderr.read().strip().splitlines() or ["it has ended"]
            raise ConfigurationError(f"the model cannot be planned: {lines[-1][:300]}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise ConfigurationError(found["error"])
        return found

    def _start(self) -> "subprocess.Popen[str]":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megablocks_utils.rehearsal.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},  # for a kernel that is only named
        )
        return self._process


def rehearse_apart(folder: Path, layout: ParallelLayout, run: PlannedRun) -> Prediction:
    """Rehearse on fake tensors in a new process, which needs no process group of its own to leave.

    Args:
        folder: holds the model's config.json; weights are not read.
        layout: how the experts are spread.
        run: what is planned; its kernel must be `grouped_mm` or `triton`: `eager` reads sizes
            back, and the packages need their GPU code.

    Raises:
        RuntimeError: the rehearsal failed, with the end of what it wrote.
    """
    interpreted = {"TRITON_INTERPRET": "1"} if run.kernel == "triton" else {}
    done = subprocess.run(
        [sys.executable, "-m", "megablocks_utils.rehearsal.worker"],
        input=build_request(folder, layout, run),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | interpreted,
    )
    found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:]}
    if "error" in found:
        raise RuntimeError(f"a rehearsal has failed:\n{found['error']}")
    return _read_prediction(found)


def _read_prediction(found: dict[str, Any]) -> Prediction:
    sent = tuple(GroupTraffic(*part) for part in found.pop("sent"))
    return Prediction(**found, sent=sent)


def build_request(folder: Path, layout: ParallelLayout, run: PlannedRun) -> str:
    """Write down what is to be rehearsed."""
    return json.dumps({"folder": str(folder), "layout": asdict(layout), "run": asdict(run)})


def read_request(text: str) -> tuple[Path, ParallelLayout, PlannedRun]:
    """Read what `build_request` has written."""
    request = json.loads(text)
    precision = ResolvedPrecision(**request["run"].pop("precision"))
    run = PlannedRun(precision=precision, **request["run"])
    return Path(request["folder"]), ParallelLayout(**request["layout"]), run


def main(argv: list[str], source: TextIO = sys.stdin, answer: TextIO = sys.stdout) -> None:
    """Describe or rehearse on fake CPU tensors, and write what was found or why it was not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")  # of libraries, about a process that nobody has launched
    logging.disable(logging.WARNING)
    build = lru_cache(maxsize=1)(_build)
    for question in source:
        try:
            found = _answer(question, build)
        except UserError as error:
            found = {"error": str(error)}
        answer.write(f"{json.dumps(found)}\n")
        answer.flush()


def _answer(
    question: str, build: Callable[[str, str, str, int | None], "PreTrainedModel"]
) -> dict[str, Any]:
    import torch

    from megablocks_utils.checkpoint.foreign_code import ForeignCode
    from megablocks_utils.rehearsal.fewer_layers import rehearse_few_layers
    from megablocks_utils.rehearsal.rehearse import rehearse
    from megablocks_utils.training.describe_model import describe_model

    asked = json.loads(question)
    if "layout" not in asked:
        model = build(asked["folder"], "bfloat16", "bfloat16", asked["truncate_layers"])
        if "packing" in asked:
            names = ("packing", "batch_size", "attention", "packing_length")
            return _probe_packing(model, *(asked[name] for name in names))
        return write_description(describe_model(model))
    folder, layout, run = read_request(question)
    device = torch.device("cpu")
    if "truncate_layers" in asked:
        precision, layers = run.precision, asked["truncate_layers"]
        model = build(str(folder), precision.weights, precision.compute, layers)
        with ForeignCode(_refuse(model.config.model_type)):
            return asdict(rehearse_few_layers(model, layout, run, device=device).as_prediction())
    return asdict(rehearse(folder, layout, run, device=device).as_prediction())


def _refuse(model_type: str) -> Callable[[str], UserError]:
    """Return what makes a sentence of an error in a model's own code."""

    def refuse(reason: str) -> UserError:
        return ConfigurationError(
            f"model type {model_type} cannot be planned: a step without memory ends with {reason}"
        )

    return refuse


def _probe_packing(
    model: "PreTrainedModel",
    packing: str,
    batch_size: int,
    attention: str,
    packing_length: int | None,
) -> dict[str, Any]:
    import torch

    from megablocks_utils.attention.implementation import own_implementation
    from megablocks_utils.attention.varlen_interface import VARLEN
    from megablocks_utils.training.step.packing_probe import AUTO, OWN, choose_packing
    from megablocks_utils.training.step.small_model import build_small_model

    device = torch.device("cpu")
    choice = choose_packing(
        lambda: build_small_model(model, device),
        packing=packing,
        batch_size=batch_size,
        device=device,
        attention=attention if attention in (AUTO, VARLEN) else OWN,
        own_attention=own_implementation(model),
        packing_length=packing_length,
    )
    return {"packing": choice.packing.value, "is_varlen": choice.attention == VARLEN}


def _build(
    folder: str, dtype: str, compute_dtype: str, truncate_layers: int | None
) -> "PreTrainedModel":
    import torch

    from megablocks_utils.rehearsal.library_patches import large_on_meta
    from megablocks_utils.training.model_source import build_bare_model

    with large_on_meta():
        model = build_bare_model(
            Path(folder),
            getattr(torch, dtype),
            getattr(torch, compute_dtype),
            truncate_layers=truncate_layers,
        )
    _freeze_unused(model)
    return model


def _freeze_unused(model: "PreTrainedModel") -> None:
    """Freeze what training on text gives no gradient, as a run does where it can find out."""
    import torch

    from megablocks_utils.training.step.small_model import build_small_model
    from megablocks_utils.training.step.unused_parameters import find_unused

    try:
        small = build_small_model(model, torch.device("cpu"))
        unused = find_unused(model, small, has_aux_loss=False)
    except UserError:
        return
    for name in unused:
        model.get_parameter(name).requires_grad_(False)


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
