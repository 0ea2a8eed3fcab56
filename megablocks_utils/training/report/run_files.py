"""What a run has left in its output folder so far, as its report shows it. Torch-free.

A run that still trains has only some of the files, and may be writing the last line of one.
"""

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.json_file import show_value
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import (
    EXPERT_LOAD_NAME,
    METRICS_NAME,
    RUN_RECORD_NAME,
    SAMPLES_NAME,
)
from megablocks_utils.processes.output_folder import LATEST_NAME, MANIFEST_NAME, follow_pointer

__all__ = ["Record", "RunFiles", "read_run_files"]

Record = dict[str, Any]

_OF_A_LOAD = {"step", "layer", "share", "max_over_mean", "rank_max_over_mean", "dead_experts"}


@dataclass(frozen=True)
class RunFiles:
    """Hold the files of a run.

    Attributes:
        folder: the output folder.
        steps: lines of `metrics.jsonl` about steps.
        evaluations: its lines about evaluations.
        loads: lines of `expert_load.jsonl`; empty where none were measured.
        samples: lines of `samples.jsonl`; empty where there are none.
        record: `run.json`; empty while the run is not finished.
        options: by section, from `run.json` or the newest checkpoint; empty without both.
    """

    folder: Path
    steps: list[Record]
    evaluations: list[Record]
    loads: list[Record]
    samples: list[Record]
    record: Record
    options: Record


def read_run_files(folder: Path) -> RunFiles:
    """Read what a run has left in `folder`.

    Raises:
        ConfigurationError: it is no output folder of a run, or a file in it is damaged.
    """
    path = folder / METRICS_NAME
    if not path.is_file():
        seen = "holds no" if folder.is_dir() else "is no folder with a"
        raise ConfigurationError(
            f"{folder} {seen} {METRICS_NAME}; it must be the --output_dir of a run."
        )
    lines, loads = _read_lines(path), _read_lines(folder / EXPERT_LOAD_NAME)
    _check_lines(lines, path, {"step"}, _is_number)
    _check_lines(loads, folder / EXPERT_LOAD_NAME, _OF_A_LOAD, _is_of_a_load)
    record = _read_record(folder / RUN_RECORD_NAME)
    manifest = {} if record else _read_record(follow_pointer(folder / LATEST_NAME) / MANIFEST_NAME)
    return RunFiles(
        folder=folder,
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "eval_loss" in line],
        loads=loads,
        samples=_read_lines(folder / SAMPLES_NAME),
        record=record,
        options=_section(record.get("options") or manifest.get("options")),
    )


def _check_lines(
    lines: Sequence[Record], path: Path, needed: Set[str], is_value: Callable[[object], bool]
) -> None:
    """Refuse lines that no run has written; the page counts on what is in them."""
    for number, line in enumerate(lines, start=1):
        if missing := sorted(needed - line.keys()):
            raise ConfigurationError(f"{path}:{number} must hold {missing[0]}, but it does not.")
        for name, value in line.items():
            is_good = isinstance(value, int) if name == "step" else is_value(value)
            if not is_good:
                raise ConfigurationError(
                    f"{path}:{number} has {name} {show_value(value)}, which no run writes."
                )


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)


def _is_of_a_load(value: object) -> bool:
    items = value if isinstance(value, list) else ()
    is_plain = isinstance(value, list | str | int | float | None)
    return is_plain and all(isinstance(item, int | float) for item in items)


def _section(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[Record]:
    """Read a file of JSON lines; none where there is no file. A last line may be half written."""
    text = _read_text(path)
    *lines, unfinished = text.split("\n")
    del unfinished  # empty where the last line is whole
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read_record(path: Path) -> Record:
    text = _read_text(path)
    return _parse(text, str(path)) if text else {}


def _read_text(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} must be text in UTF-8, but it is not.") from error


def _parse(text: str, place: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{place} must hold a JSON object, but {error}.") from error
    if not isinstance(record, dict):
        raise ConfigurationError(
            f"{place} must hold a JSON object, but it is {show_value(record)}."
        )
    return record
