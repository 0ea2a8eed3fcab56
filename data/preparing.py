"""Hold what the preparing scripts of this folder share."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path("data/.cache")
"""Where everything built here goes by default; ignored by git."""


class PreparationError(Exception):
    """Report in one sentence why something cannot be built."""


def find_package(module: str, install: str) -> Path:
    """Return an installed package's folder without importing it.

    Args:
        module: its import name.
        install: the command that installs it, for the message.

    Raises:
        PreparationError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise PreparationError(f"the package {module} is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0])


def write_json(path: Path, value: Any) -> None:
    """Write a temporary file and rename it, so that the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def say(text: str, *, is_error: bool = False) -> None:
    """Show one line, unwrapped and as it is."""
    from rich.console import Console

    Console(stderr=is_error, soft_wrap=True, highlight=False).print(text, markup=False)


def exit_code_of(work: Callable[[], None]) -> int:
    """Run a script's work; return 0, or 2 after showing the sentence of a PreparationError."""
    try:
        work()
    except PreparationError as error:
        say(str(error), is_error=True)
        return 2
    return 0
