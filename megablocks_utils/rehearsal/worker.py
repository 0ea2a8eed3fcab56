"""Rehearse a layout in a process of its own: request on standard input, answer on standard output.

python -m megablocks_utils.rehearsal.worker < request.json
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from megablocks_utils.config import ResolvedPrecision
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun, Prediction
from megablocks_utils.processes.entry_point import run_entry_point

__all__ = ["build_request", "main", "read_request", "rehearse_apart"]


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
    if done.returncode != 0:
        raise RuntimeError(f"a rehearsal has failed:\n{done.stderr[-2000:]}")
    return Prediction(**json.loads(done.stdout))


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
    """Rehearse on fake CPU tensors, and write a prediction's fields.

    Raises:
        UserError: as `rehearsal.rehearse`.
    """
    folder, layout, run = read_request(source.read())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")  # of libraries, about a process that nobody has launched
    logging.disable(logging.WARNING)

    import torch

    from megablocks_utils.rehearsal.rehearse import rehearse

    prediction = rehearse(folder, layout, run, device=torch.device("cpu")).as_prediction()
    answer.write(json.dumps(asdict(prediction)))


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
