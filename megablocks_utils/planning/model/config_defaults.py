"""Entries of a family's config with their defaults, as transformers' source has them.

They are read off the source, because importing it imports torch, which takes seconds. Torch-free.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megablocks_utils.errors import ConfigurationError

__all__ = ["read_defaults"]


@lru_cache
def read_defaults(model_type: str) -> Mapping[str, Any]:
    """Return each entry that the config's class declares, with its default.

    Raises:
        ConfigurationError: transformers is not there, or has no such class.
    """
    for node in _parse_source(model_type).body:
        if isinstance(node, ast.ClassDef) and _is_of(node, model_type):
            return MappingProxyType(dict(_list_defaults(node)))
    raise _not_found(model_type)


def _parse_source(model_type: str) -> ast.Module:
    package = find_spec("transformers")
    if package is None or package.origin is None:
        raise _not_found(model_type)
    folder = Path(package.origin).parent / "models" / model_type
    try:
        return ast.parse((folder / f"configuration_{model_type}.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise _not_found(model_type) from error


def _is_of(node: ast.ClassDef, model_type: str) -> bool:
    """Return whether a class says that it is of this model type."""
    return any(
        isinstance(line, ast.Assign)
        and ast.unparse(line.targets[0]) == "model_type"
        and ast.unparse(line.value) == repr(model_type)
        for line in node.body
    )


def _list_defaults(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Yield what a dataclass declares, but what is computed."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Constant):
            yield ast.unparse(line.target), line.value.value


def _not_found(model_type: str) -> ConfigurationError:
    return ConfigurationError(
        f"model_type is {model_type!r} in the model's config.json, but the defaults of such a "
        "config cannot be read: transformers must be installed, with its source."
    )
