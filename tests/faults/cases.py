"""One run that is killed at some moment, and the run that resumes from what it left."""

import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from megablocks_utils.errors import CheckpointError
from megablocks_utils.processes.output_folder import (
    INCOMPLETE_SUFFIX,
    LATEST_NAME,
    MANIFEST_NAME,
    find_checkpoints,
    find_incomplete,
)
from megablocks_utils.training.report.metrics import read_metrics
from tests.faults.ground import NUM_STEPS, RUN_TIMEOUT_S, SAVE_STEPS, WORLD_SIZE, Ground
from tests.faults.ranks import SCRIPTS, ScriptRun

__all__ = [
    "MOMENTS",
    "PHASES",
    "Case",
    "Ground",
    "TooLate",
    "count_steps",
    "draw_case",
    "play",
    "wait_for",
]

MOMENTS = ("step", "save", "rename")  # what is aimed at
PHASES = ("step", "save", "rename", "end")  # what was hit
END_TIMEOUT_S = 60.0
POLL_S = 0.0005
_NUMBERS = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "input_tokens")


class TooLate(Exception):
    """Report that a run was over before it could be killed: nothing was tried."""


@dataclass(frozen=True)
class Case:
    """Say which run is killed when.

    Attributes:
        script: of `SCRIPTS`.
        is_async: with `--async_save True`.
        moment: of `MOMENTS`.
        step: it is waited until so many steps are done, or until this step is being saved.
        delay_s: and so long from then on.
        victims: the ranks that are killed.
    """

    script: str
    is_async: bool
    moment: str
    step: int
    delay_s: float
    victims: tuple[int, ...]

    @property
    def options(self) -> list[str]:
        """The case's own words of the command line."""
        return ["--async_save", "True"] if self.is_async else []


def draw_case(rng: random.Random) -> Case:
    """Draw a case so that all moments and victims come often."""
    moment = rng.choice(MOMENTS)
    saved = range(SAVE_STEPS, NUM_STEPS + 1, SAVE_STEPS)
    # A step takes 0.1 to 0.3 s on two cores, writing 0.1 s, and the rename some milliseconds.
    longest_s = {"step": 0.3, "save": 0.1, "rename": 0.006}[moment]
    others = [(rank,) for rank in range(1, WORLD_SIZE)]
    return Case(
        script=rng.choices(sorted(SCRIPTS), weights=(1, 3))[0],
        is_async=rng.random() < 0.3,
        moment=moment,
        step=rng.randrange(NUM_STEPS + 1) if moment == "step" else rng.choice(saved),
        delay_s=rng.uniform(0.0, longest_s),
        victims=rng.choice([tuple(range(WORLD_SIZE)), (0,), rng.choice(others)]),
    )


def play(ground: Ground, case: Case, name: str) -> dict[str, Any]:
    """Kill a run as the case says, go on with it, and return what happened.

    The output folder is removed if all went well.

    Raises:
        TooLate: the run was over.
    """
    folder = ground.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        row = _kill(ground, case, name, folder)
    except TooLate:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    row |= _look_at_ruins(folder)
    complete, incomplete = find_checkpoints(folder), find_incomplete(folder)
    row["resumed_from"] = complete[-1][0] if complete else None
    words = ["--resume_from_checkpoint", "True"] if complete else []
    try:
        output = ground.run(case.script, name, *case.options, *words)
        row["differences"] = _compare(folder, ground.reference(case.script))
        row["unreported"] = [path.name for path in incomplete if path.name not in output]
    except (RuntimeError, TimeoutError) as error:
        row["differences"] = [f"it did not go on: {error}"]
        row["unreported"] = []
    row["is_equal"] = not row["differences"]
    row["is_good"] = row["is_equal"] and not (
        row["damaged"] or row["unreported"] or row["wrong_endings"]
    )
    if row["is_good"]:
        shutil.rmtree(folder)
    return {"case": asdict(case), **row}


def _kill(ground: Ground, case: Case, name: str, folder: Path) -> dict[str, Any]:
    with ground.start(case.script, name, *case.options) as run:
        wait_for(_condition(case, folder), run)
        time.sleep(case.delay_s)
        try:
            run.freeze()
        except ProcessLookupError as error:
            raise TooLate from error
        if (folder / "run.json").exists():
            raise TooLate
        phase, num_done = _describe_moment(folder, ground.num_steps), count_steps(folder)
        run.kill(case.victims)
        killed_s = time.monotonic()
        run.thaw()
        noticed_s = _time_of_message(run, killed_s)
        codes = run.wait(END_TIMEOUT_S)
        return {
            "phase": phase,
            "steps_done": num_done,
            "noticed_s": noticed_s,
            "ended_s": time.monotonic() - killed_s,
            "exit_codes": codes,
            "losses": run.losses(),
            "wrong_endings": _check_endings(case, run, codes, phase),
        }


def _condition(case: Case, folder: Path) -> Callable[[], bool]:
    """Return what says that the moment has come."""
    final = folder / f"checkpoint-{case.step}"
    aside = final.with_name(final.name + INCOMPLETE_SUFFIX)
    metrics = folder / "metrics.jsonl"
    return {
        "step": lambda: metrics.is_file() and count_steps(folder) >= case.step,
        "save": lambda: aside.is_dir() or final.is_dir(),
        "rename": lambda: (aside / MANIFEST_NAME).is_file() or final.is_dir(),
    }[case.moment]


def wait_for(condition: Callable[[], bool], run: ScriptRun) -> None:
    """Wait until something is so.

    Raises:
        RuntimeError: the run has ended without it.
        TimeoutError: it took too long.
    """
    deadline = time.monotonic() + RUN_TIMEOUT_S
    polls = 0
    while not condition():
        polls += 1
        if polls % 200 == 0 and not run.is_running():
            raise RuntimeError(f"the run ended by itself:\n{run.output()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the moment never came:\n{run.output()}")
        time.sleep(POLL_S)


def count_steps(folder: Path) -> int:
    """Return how many steps the metrics in a folder have."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _describe_moment(folder: Path, num_steps: int) -> str:
    """Return what a run is at by what is in its folder, while it stands still."""
    for aside in find_incomplete(folder):
        return "rename" if (aside / MANIFEST_NAME).exists() else "save"
    complete = find_checkpoints(folder)
    if not complete:
        return "step"
    step, newest = complete[-1]
    pointer = folder / LATEST_NAME
    if not pointer.is_symlink() or pointer.readlink().name != newest.name:
        return "rename"
    return "end" if step == num_steps else "step"


def _time_of_message(run: ScriptRun, since_s: float) -> float | None:
    """Wait for the sentence about the lost rank; None if all end without one."""
    while run.is_any_running():
        if run.losses():
            return time.monotonic() - since_s
        time.sleep(0.05)
        if time.monotonic() - since_s > END_TIMEOUT_S:
            return None
    return time.monotonic() - since_s if run.losses() else None


def _check_endings(case: Case, run: ScriptRun, codes: list[int], phase: str) -> list[str]:
    """Return what is wrong with how the ranks ended and what they said."""
    survivors = set(run.ranks) - set(case.victims)
    found = [codes[rank] for rank in sorted(survivors)]
    losses = run.losses()
    # Late enough, the others have already left or need the lost one no more.
    if phase == "end" and survivors and not any(found) and not losses:
        return []
    wrong = []
    if any(code != 1 for code in found):
        wrong.append(f"survivors ended with {found}")
    if len(losses) != bool(survivors):
        wrong.append(f"{len(losses)} sentences name a lost rank")
    if survivors and not all(
        re.match(rf"rank {case.victims[0]} \(process {run.pids[case.victims[0]]} ", loss)
        for loss in losses
    ):
        wrong.append("a sentence names another rank")
    if "Traceback (most recent call last)" in run.output():
        wrong.append("a traceback")
    return wrong


def _look_at_ruins(folder: Path) -> dict[str, Any]:
    """Check every folder that has the name of a complete checkpoint."""
    damaged = []
    named = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    for path in named:
        try:
            files = read_manifest(path)["files"]
            check_files(path, files, files)
        except CheckpointError as error:
            damaged.append(str(error))
    pointer = folder / LATEST_NAME
    if pointer.is_symlink() and not (pointer / MANIFEST_NAME).is_file():
        damaged.append(f"{LATEST_NAME} points to {pointer.readlink()}")
    return {
        "complete": sorted(path.name for path in named),
        "incomplete": [path.name for path in find_incomplete(folder)],
        "damaged": damaged,
    }


def _compare(folder: Path, reference: Path) -> list[str]:
    """Return in what a run that went on differs from the undisturbed one."""
    differences = []
    found, wanted = (_read_series(path) for path in (folder, reference))
    if [row["step"] for row in found] != list(range(1, len(wanted) + 1)):
        differences.append(f"steps {[row['step'] for row in found]}")
    elif found != wanted:
        differences += [
            f"{key} of step {ours['step']}: {ours[key]} for {theirs[key]}"
            for ours, theirs in zip(found, wanted, strict=True)
            for key in _NUMBERS
            if ours[key] != theirs[key]
        ]
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, reference)]
    if weights[0] != weights[1]:
        differences.append("model.safetensors")
    names = [sorted(path.name for path in f.glob("checkpoint-*")) for f in (folder, reference)]
    if names[0] != names[1]:
        differences.append(f"checkpoints {names[0]}")
    differences += _look_at_ruins(folder)["damaged"]
    return differences


def _read_series(folder: Path) -> list[dict[str, Any]]:
    steps = read_metrics(folder / "metrics.jsonl")
    return [{key: getattr(step, key) for key in _NUMBERS} for step in steps]
