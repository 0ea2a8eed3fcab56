"""A process for one rehearsal: request on standard input, answer on standard output.

python -m megablocks_utils.rehearsal.worker < request.json
"""

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from megablocks_utils.config import ResolvedPrecision
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun
from megablocks_utils.processes.entry_point import run_entry_point

__all__ = ["build_request", "main", "read_request"]


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
    answer.write(json.dumps(_as_record(prediction)))


def _as_record(prediction: Any) -> dict[str, Any]:
    return {name: getattr(prediction, name) for name in prediction.__dataclass_fields__}


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
