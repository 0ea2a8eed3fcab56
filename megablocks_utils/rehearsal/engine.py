"""The fake engine of `plan`: each layout rehearsed in a process of its own. Imports no torch."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun, Prediction
from megablocks_utils.rehearsal.worker import build_request

__all__ = ["KERNELS", "predict_fake"]

KERNELS = ("grouped_mm", "triton")
"""Backends that can be rehearsed: `eager` reads sizes back, the packages need their GPU code."""

_USER_ERROR = 2


def predict_fake(
    model: Path,
    layouts: Sequence[ParallelLayout],
    run: PlannedRun,
    *,
    processes: int | None = None,
    on_layout: Callable[[int], None] = lambda _: None,
) -> list[Prediction]:
    """Rehearse a step in every layout; half a minute each for the largest models.

    Args:
        model: a config.json, or a folder that holds one; weights are not read.
        layouts: to be rehearsed.
        run: what is planned.
        processes: how many rehearse at a time; None: one a core, four at most. Each takes less
            than 1 GiB.
        on_layout: called with 1 after each, for a progress bar.

    Returns:
        A prediction for each layout, in their order.

    Raises:
        ConfigurationError: something that cannot be rehearsed.
        RuntimeError: a rehearsal that failed, with the end of what it wrote.
    """
    if run.kernel not in KERNELS:
        raise ConfigurationError(
            f"--kernel is {run.kernel}, but the fake engine rehearses {' and '.join(KERNELS)} "
            "only; --engine formula knows all."
        )
    with _folder_of(model) as folder, ThreadPoolExecutor(processes or _count_workers()) as pool:

        def predict(layout: ParallelLayout) -> Prediction:
            prediction = _rehearse(build_request(Path(folder), layout, run), run.kernel)
            on_layout(1)
            return prediction

        return list(pool.map(predict, layouts))


def _count_workers() -> int:
    return min(4, os.cpu_count() or 1)


def _rehearse(request: str, kernel: str) -> Prediction:
    environment = os.environ | {"TRITON_INTERPRET": "1"} if kernel == "triton" else None
    done = subprocess.run(
        [sys.executable, "-m", "megablocks_utils.rehearsal.worker"],
        input=request,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode == _USER_ERROR:
        raise ConfigurationError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        raise RuntimeError(f"a rehearsal has failed:\n{done.stderr[-2000:]}")
    return Prediction(**json.loads(done.stdout))


@contextmanager
def _folder_of(model: Path) -> Iterator[Path]:
    """Yield a folder whose config.json is the model's."""
    if model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(model, Path(folder, "config.json"))
        yield Path(folder)
