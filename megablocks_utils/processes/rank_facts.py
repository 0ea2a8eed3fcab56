"""What must be the same on all ranks of a run, and the sentence where it is not.

Torch-free.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megablocks_utils
from megablocks_utils.config import RunConfig
from megablocks_utils.config.given import GivenOption
from megablocks_utils.config.values import join_words

__all__ = ["compute_digest", "describe_difference", "describe_run", "hash_sources"]

# Two machines may have the same files in different places: what is in them is compared later.
_PATHS = ("model_name_or_path", "data_path", "eval_data_path", "chat_template", "resume_adapter")
_LIBRARIES = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "tokenizers"),
    *("numpy", "triton", "scattermoe", "megablocks"),
)
# What accelerate launch reads from its configuration file, which every machine has for itself.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_OF_ONE_MACHINE = ("ACCELERATE_CPU_AFFINITY",)
_MAX_NAMED = 3
_MAX_VALUE = 60


def describe_run(
    config: RunConfig,
    leftovers: Iterable[GivenOption] = (),
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return what must be the same on all ranks, by name.

    Args:
        config: the options; a path that may differ between machines counts as given or not.
        leftovers: those that FSDP1 hands to TrainingArguments.
        environ: where accelerate launch puts its configuration.
    """
    options = dict(_flatten(asdict(config)))
    for name in _PATHS:
        if name in options:
            options[name] = options[name] is not None
    facts = {f"--{name}": _as_text(value) for name, value in sorted(options.items())}
    facts |= {f"--{given.name}": " ".join(given.values) for given in leftovers}
    facts |= {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_LAUNCHER_PREFIXES) and name not in _OF_ONE_MACHINE
    }
    python = ".".join(platform.python_version_tuple()[:2])
    package = Path(megablocks_utils.__file__).parent
    return {
        **facts,
        "Python": python,
        **{name: _read_version(name) for name in _LIBRARIES},
        "megablocks_utils": f"sources {hash_sources(package)[:12]}",
    }


def compute_digest(facts: Mapping[str, str]) -> str:
    """Return a digest that is equal where all facts are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe_difference(
    facts: Mapping[str, str], of_rank_0: Mapping[str, str], *, rank: str, rank_0: str
) -> str:
    """Return the sentence about a rank that runs something else than rank 0.

    Args:
        facts: of the rank.
        of_rank_0: of rank 0.
        rank: how to call the rank.
        rank_0: how to call rank 0.
    """
    names = [
        name
        for name in dict.fromkeys((*of_rank_0, *facts))
        if facts.get(name) != of_rank_0.get(name)
    ]
    named = names[:_MAX_NAMED]
    theirs, ours = (
        join_words([f"{name} {_shorten(values.get(name))}" for name in named], "and")
        for values in (facts, of_rank_0)
    )
    more = f" ({len(names) - len(named)} more differ)" if names[_MAX_NAMED:] else ""
    return (
        f"{rank} has {theirs}, but {rank_0} has {ours}{more}; all ranks of a run must be started "
        "with the same options and versions."
    )


def hash_sources(package: Path) -> str:
    """Return the SHA-256 of the package's Python files, names and content."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _flatten(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value)
        else:
            yield name, value


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _shorten(value: str | None) -> str:
    if not value:
        return "not set" if value is None else "empty"
    return value if len(value) <= _MAX_VALUE else f"{value[: _MAX_VALUE - 3]}..."


def _read_version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
