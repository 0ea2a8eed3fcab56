"""What tokens are made of: the key under which they are kept.

Two loads share their tokens exactly when nothing differs that could change them: the bytes of the
data, the tokenizer with its chat template, the code that turns one into the other, and the date
where the template writes one.
"""

import errno
import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.template_date import writes_date
from megablocks_utils.training.data.token_files import digest_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FileState", "digest_file", "digest_records", "file_state"]
__all__ += ["token_key"]

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets")
FileState = tuple[int, int, int]


def token_key(
    data_digest: str, tokenizer: "PreTrainedTokenizerBase | None", today: date
) -> str | None:
    """Return the key of tokens; None where the tokenizer cannot be told from others.

    Args:
        data_digest: of the records.
        tokenizer: None for data that is already tokenized.
        today: what a chat template that asks for the date is told.
    """
    identity = _describe_tokenizer(tokenizer)
    if identity is None:
        return None
    made_of = {
        "data": data_digest,
        "tokenizer": identity,
        "date": today.isoformat() if writes_date(tokenizer) else None,
        "code": _digest_code(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return digest_json(made_of)


def digest_file(path: Path) -> tuple[str, FileState]:
    """Return the checksum of a file, and what tells whether it is changed afterwards.

    Raises:
        OSError: it cannot be read.
    """
    state = file_state(path)  # before it is opened: a FIFO would be waited for
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A list and an object per line are read differently.
    return digest + path.suffix, state


def file_state(path: Path) -> FileState:
    """Return what is another number once a file is changed or replaced.

    Raises:
        OSError: it is no regular file, or not there.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return state.st_ino, state.st_size, state.st_mtime_ns


def digest_records(records: Iterable[Record]) -> str:
    """Return the checksum of records, for a source that is no file."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.columns, default=str).encode() + b"\n")
    return digest.hexdigest()


def _describe_tokenizer(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, Any] | None:
    if tokenizer is None:
        return {}
    if not tokenizer.is_fast:
        return None
    return {
        "class": type(tokenizer).__qualname__,
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "settings": _plain_settings(tokenizer.init_kwargs),
    }


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep settings proper: no places of files, no objects, which the backend shows."""
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str | None)
        and not name.endswith(("_file", "name_or_path"))
    }


@cache
def _digest_code() -> str:
    """Return the checksum of this package's code, so that tokens of another one are not used."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".jinja"))
    return digest_json({path.name: path.read_text(encoding="utf-8") for path in files})
