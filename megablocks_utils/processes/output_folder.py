"""The output folder: what may be written into it, and which checkpoint in it a run resumes from.

Torch-free. A checkpoint is complete when `checkpoint-<step>/` holds `manifest.json`, which is
written last; `checkpoint-latest` points to the newest complete one.
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megablocks_utils.config import RunConfig
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import (
    ADAPTER_WEIGHTS_NAME,
    EXPERT_LOAD_NAME,
    EXPERT_LOAD_PLOT_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    MODEL_INDEX_NAME,
    RUN_RECORD_NAME,
    SAMPLES_NAME,
    SAMPLES_PAGE_NAME,
    STAGING_FOLDER_NAME,
    TRACKER_RUNS_NAME,
    TRACKERS_FOLDER_NAME,
    remove_path,
)
from megablocks_utils.processes.claim_file import (
    CLAIM_NAME,
    describe_holder,
    is_held_here,
    is_same_run,
    read_claim,
)

__all__ = [
    "CHECKPOINT_PREFIX",
    "INCOMPLETE_SUFFIX",
    "LATEST_NAME",
    "MANIFEST_NAME",
    "check_output_dir",
    "choose_checkpoint",
    "clear_output_dir",
    "find_checkpoints",
    "find_incomplete",
    "follow_pointer",
    "remove_checkpoint",
]

CHECKPOINT_PREFIX = "checkpoint-"
INCOMPLETE_SUFFIX = ".incomplete"
LATEST_NAME = "checkpoint-latest"
MANIFEST_NAME = "manifest.json"
_MAX_NAME_BYTES = 100
_FINISHED_FILES = (RUN_RECORD_NAME, "model*.safetensors", ADAPTER_WEIGHTS_NAME)
# A run that resumes takes the loads and samples of its steps from its checkpoint.
_LOAD_FILES = (EXPERT_LOAD_NAME, EXPERT_LOAD_PLOT_NAME)
_SAMPLE_FILES = (SAMPLES_NAME, SAMPLES_PAGE_NAME)
_RESULT_FILES = (*_FINISHED_FILES, MODEL_INDEX_NAME, *_LOAD_FILES, *_SAMPLE_FILES)
_OWN_FILES = (
    *(METRICS_NAME, RUN_RECORD_NAME, LOSS_PLOT_NAME, *_LOAD_FILES, *_SAMPLE_FILES),
    *(CLAIM_NAME, LATEST_NAME, TRACKER_RUNS_NAME),
)
_OWN_NAMES = (
    *(METRICS_NAME, LOSS_PLOT_NAME, *_LOAD_FILES, *_SAMPLE_FILES, TRACKER_RUNS_NAME),
    *(TRACKERS_FOLDER_NAME, STAGING_FOLDER_NAME),
)


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints in `folder` as (step, path), the oldest first."""
    found = _find_checkpoint_folders(folder)
    return sorted((step, path) for step, path in found if _is_complete(path))


def find_incomplete(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` that were never finished, the oldest first."""
    found = _find_checkpoint_folders(folder)
    return [path for _, path in sorted(found) if not _is_complete(path)]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; what an interrupted removal leaves does not look complete.

    Of one that is elsewhere, and linked to, the link alone is removed.
    """
    if not path.is_symlink():
        (path / MANIFEST_NAME).unlink(missing_ok=True)
    remove_path(path)


def follow_pointer(path: Path) -> Path:
    """Return the checkpoint that `path` points to, by a link or a small file; else `path`."""
    if path.is_symlink():
        return path.resolve()
    if path.name == LATEST_NAME and path.is_file():
        name = path.read_bytes()[:_MAX_NAME_BYTES].decode(errors="replace").strip()
        if re.fullmatch(rf"{CHECKPOINT_PREFIX}[0-9]+", name):
            return path.with_name(name)
    return path


def choose_checkpoint(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the checkpoint that a run resumes from; None for a run that starts fresh.

    `--resume_from_checkpoint` says which, with one exception: when torchrun has restarted the
    processes of a run that had claimed its output folder, the newest complete checkpoint there is
    taken, whatever the option says.

    Raises:
        ConfigurationError: for a checkpoint that is not there or not complete.
    """
    folder, given = Path(config.output_dir), config.saving.resume_from_checkpoint
    complete = find_checkpoints(folder)
    if complete and is_same_run(read_claim(folder), environ):
        return complete[-1][1]
    if given.lower() == "false":
        return None
    if given.lower() == "auto":
        return complete[-1][1] if complete else None
    if given.lower() != "true":
        return _check_checkpoint(Path(given))
    if not complete:
        raise ConfigurationError(
            f"--resume_from_checkpoint is {given}, but --output_dir {folder} holds no complete "
            f"checkpoint{_name_incomplete(folder)}; start without --resume_from_checkpoint."
        )
    return complete[-1][1]


def check_output_dir(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the output folder, or refuse one that cannot or must not be written.

    Makes nothing: a run that is refused later, for its data or model, leaves no trace.

    Raises:
        ConfigurationError: for a folder that holds a finished run or checkpoints of another one
            (unless resuming), or checkpoints later than the one to resume from; both are allowed
            with `--overwrite_output_dir True`. For a folder that another run of this machine has,
            a file, a place where nothing can be written, and as `choose_checkpoint`.
    """
    folder = Path(config.output_dir)
    seen = f"--output_dir is {config.output_dir}, but"
    claim = read_claim(folder)
    is_restart = is_same_run(claim, environ)
    if claim is not None and not is_restart and is_held_here(claim):
        raise ConfigurationError(describe_holder(config.output_dir, claim))
    try:
        chosen = choose_checkpoint(config, environ)
        _refuse_strangers(folder, seen)
        if not (config.overwrite_output_dir or is_restart):
            if chosen is None:
                _refuse_earlier_run(folder, seen)
            else:
                _refuse_later_checkpoints(folder, chosen, seen)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            which = "that" if existing == folder else str(existing)
            raise ConfigurationError(f"{seen} {which} is a file; it must be a folder.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError(f"{seen} it cannot be written ({error.strerror}).") from error
    return folder


def clear_output_dir(config: RunConfig, chosen: Path | None) -> None:
    """Remove what an earlier run has left in the output folder; links, but nothing they lead to.

    Old model files must go: transformers would load a stale `model.safetensors` in place of new
    shards. A run that resumes keeps metrics and checkpoints; one that overwrites removes old
    checkpoints, which must never be resumed by mistake.

    Args:
        config: The run.
        chosen: The checkpoint it resumes from.

    Raises:
        OSError: Something cannot be removed.
    """
    folder = Path(config.output_dir)
    unused = () if config.report_to else (TRACKERS_FOLDER_NAME,)
    for name in _OWN_NAMES:
        if name not in unused and (folder / name).is_symlink():
            (folder / name).unlink()
            sys.stderr.write(
                f"{folder / name} was a link and is written anew; what it led to is left alone.\n"
            )
    for pattern in (*_RESULT_FILES, *(() if chosen else (METRICS_NAME, TRACKER_RUNS_NAME))):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if config.overwrite_output_dir:
        _remove_checkpoints(folder, chosen)


def _find_checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return every folder named as a checkpoint, complete or not, with its step."""
    name = re.compile(rf"{CHECKPOINT_PREFIX}([0-9]+)({re.escape(INCOMPLETE_SUFFIX)})?")
    paths = [path for path in folder.glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir()]
    matches = [(name.fullmatch(path.name), path) for path in paths]
    return [(int(match[1]), path) for match, path in matches if match]


def _is_complete(path: Path) -> bool:
    return not path.name.endswith(INCOMPLETE_SUFFIX) and (path / MANIFEST_NAME).is_file()


def _check_checkpoint(path: Path) -> Path:
    seen = f"--resume_from_checkpoint is {path}, but"
    wanted = "it must be True, False, auto or the folder of a complete checkpoint"
    path = follow_pointer(path)
    if not path.is_dir():
        raise ConfigurationError(f"{seen} that is no folder; {wanted}.")
    if not _is_complete(path):
        inside = find_checkpoints(path)
        hint = f", such as {inside[-1][1]}" if inside else ""
        raise ConfigurationError(f"{seen} that holds no {MANIFEST_NAME}; {wanted}{hint}.")
    return path


def _name_incomplete(folder: Path) -> str:
    names = [path.name for path in find_incomplete(folder)]
    return f" (never finished: {join_words(names, 'and')})" if names else ""


def _refuse_strangers(folder: Path, seen: str) -> None:
    """Refuse what bears the name of a file of ours and is none, such as a folder or a pipe."""
    for path in (folder / name for name in _OWN_FILES):
        if os.path.lexists(path) and not path.is_symlink() and not path.is_file():
            raise ConfigurationError(
                f"{seen} {path.name} in it is no regular file; move that away, or choose another "
                "folder."
            )


def _refuse_earlier_run(folder: Path, seen: str) -> None:
    finished = [path for pattern in _FINISHED_FILES for path in sorted(folder.glob(pattern))]
    if finished:
        raise ConfigurationError(
            f"{seen} it holds a finished run ({finished[0].name}); choose another folder or "
            "give --overwrite_output_dir True."
        )
    if complete := find_checkpoints(folder):
        raise ConfigurationError(
            f"{seen} it holds checkpoints of a run that has not finished (the newest is "
            f"{complete[-1][1].name}); give --resume_from_checkpoint True to resume it, another "
            "folder, or --overwrite_output_dir True."
        )


def _refuse_later_checkpoints(folder: Path, chosen: Path, seen: str) -> None:
    if later := _find_later(folder, chosen):
        raise ConfigurationError(
            f"{seen} it holds {later[-1].name}, which does not belong to a run that resumes from "
            f"{chosen}; choose another folder, or give --overwrite_output_dir True to delete it."
        )


def _find_later(folder: Path, chosen: Path) -> list[Path]:
    """Return the complete checkpoints in `folder` that are not on the way to `chosen`."""
    complete = find_checkpoints(folder)
    own = [step for step, path in complete if path.resolve() == chosen.resolve()]
    return [path for step, path in complete if not own or step > own[0]]


def _remove_checkpoints(folder: Path, chosen: Path | None) -> None:
    """Remove what must never be resumed by mistake: all, or those later than `chosen`."""
    if chosen is not None:
        for path in _find_later(folder, chosen):
            remove_checkpoint(path)
        return
    remove_path(folder / LATEST_NAME)
    for _, path in _find_checkpoint_folders(folder):
        remove_checkpoint(path)
