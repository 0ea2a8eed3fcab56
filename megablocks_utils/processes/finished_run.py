"""A run that has finished already, which a batch system starts once more. Torch-free."""

import json
from dataclasses import asdict
from pathlib import Path

from megablocks_utils.config import RunConfig
from megablocks_utils.config.record import flatten_learned
from megablocks_utils.files import RUN_RECORD_NAME

__all__ = ["is_finished_run"]


def is_finished_run(config: RunConfig) -> bool:
    """Return whether `--output_dir` holds this very run, finished.

    Only `--resume_from_checkpoint auto` asks for it, the one command for start and requeue, and not
    beside `--overwrite_output_dir True`. A run with other options that change what is learned,
    such as more steps, is another run.
    """
    is_asked = config.saving.resume_from_checkpoint.lower() == "auto"
    if not is_asked or config.overwrite_output_dir:
        return False
    try:
        record = json.loads((Path(config.output_dir) / RUN_RECORD_NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    stored = record.get("options") if isinstance(record, dict) else None
    if not isinstance(stored, dict):
        return False
    before, own = flatten_learned(stored), json.loads(json.dumps(flatten_learned(asdict(config))))
    return all(before.get(name, value) == value for name, value in own.items())
