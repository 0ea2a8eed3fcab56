"""How long each backend takes: entries on this machine's disk, and those that are shipped.

A training run only reads. `python -m megablocks_utils.tune` measures and writes.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import write_json_atomically
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.fused.tiles import bucket_of
from megablocks_utils.kernels.shapes import ExpertShapes, name_dtype

__all__ = [
    "CACHE_VARIABLE",
    "SHIPPED_PATH",
    "Entry",
    "LayerKey",
    "Measurements",
    "build_key",
    "cache_path",
    "read_entries",
    "read_measurements",
    "store_entry",
]

CACHE_VARIABLE = "MEGABLOCKS_UTILS_CACHE"
SHIPPED_PATH = Path(__file__).with_name("measured.json")
"""Of the same form as a machine's own file; measured by the project's benchmarks."""

_VERSION = 2
# Of entries that were written when nothing but SwiGLU was measured, and so do not say it.
_FIRST_FORM = "silu"


@dataclass(frozen=True)
class LayerKey:
    """Say what was measured: results are believed for exactly this and nothing else.

    Attributes:
        gpu: its name.
        torch: version.
        triton: version.
        hidden_size: H.
        intermediate_size: I.
        num_local_experts: L.
        top_k: K of the backend's rows: 1 under expert parallelism.
        rows: power of two below the number of routed rows.
        dtype: of compute.
        mode: which expert parameters are trained.
        form: `ExpertShapes.form`.
    """

    gpu: str
    torch: str
    triton: str
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    top_k: int
    rows: int
    dtype: str
    mode: str
    form: str

    @property
    def without_versions(self) -> tuple[object, ...]:
        """What the shipped measurements are found by; each says which versions it was made with."""
        return tuple(value for name, value in asdict(self).items() if name not in _VERSIONS)


_VERSIONS = ("torch", "triton")


@dataclass(frozen=True)
class Entry:
    """A measurement of one layer, forward and backward.

    Attributes:
        key: what was measured.
        times_ms: of each backend that was measured; None where it ran out of memory.
        tiles: the fastest that were found for our Triton kernels; None where they did not run.
        date: of the measurement, 2026-01-31.
        lora_r: rank of the adapters that were measured; None in the other modes.
    """

    key: LayerKey
    times_ms: Mapping[str, float | None]
    tiles: TileTable | None
    date: str
    lora_r: int | None = None

    @property
    def ranking(self) -> list[tuple[float, str]]:
        """Times and names of the backends that had memory enough, the fastest first.

        Of equal ones the first in `times_ms` comes first.
        """
        timed = [(ms, name) for name, ms in self.times_ms.items() if ms is not None]
        return sorted(timed, key=lambda pair: pair[0])

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_json` takes it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> Self:
        """Read what `as_json` wrote.

        Raises:
            ValueError: anything else.
        """
        if set(payload) != {field.name for field in fields(cls)}:
            raise ValueError(f"an entry has {', '.join(payload) or 'nothing'}")
        tiles = payload["tiles"]
        read = {
            "key": _read_key(payload["key"]),
            "times_ms": _read_times(payload["times_ms"]),
            "tiles": None if tiles is None else TileTable.from_json(tiles),
        }
        return cls(**{**payload, **read})


def _read_key(payload: Mapping[str, Any]) -> LayerKey:
    payload = {"form": _FIRST_FORM, **payload}
    wanted = {field.name: field.type for field in fields(LayerKey)}
    if {name: type(value) for name, value in payload.items()} != wanted:
        raise ValueError(f"a key is {dict(payload)}")
    return LayerKey(**payload)


def _read_times(payload: Mapping[str, Any]) -> dict[str, float | None]:
    for name, time_ms in payload.items():
        if time_ms is not None and type(time_ms) not in (int, float):
            raise ValueError(f"the time of {name} is {time_ms}")
    return dict(payload)


def build_key(shapes: ExpertShapes, device: DeviceFacts) -> LayerKey | None:
    """Return what measurements of these experts are found by, or None where too little is known."""
    if None in (shapes.num_local_experts, shapes.top_k, shapes.num_rows):
        return None
    num_local_experts, top_k, num_rows = shapes.counts
    return LayerKey(
        gpu=device.name,
        torch=device.torch_version,
        triton=device.triton_version or "unknown",
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_local_experts=num_local_experts,
        top_k=top_k,
        rows=bucket_of(num_rows),
        dtype=name_dtype(shapes.dtype),
        mode=shapes.mode,
        form=shapes.form,
    )


@dataclass(frozen=True)
class Measurements:
    """All that is known when a backend is chosen.

    Attributes:
        own: entries of this machine's file.
        shipped: entries that come with the package.
        problem: a clause that says why the machine's file cannot be used, or None.
    """

    own: tuple[Entry, ...] = ()
    shipped: tuple[Entry, ...] = ()
    problem: str | None = None

    def find(self, key: LayerKey | None) -> Entry | None:
        """Return what was measured for a key: here with these versions, or else by the project."""
        if key is None:
            return None
        for entry in self.own:
            if entry.key == key:
                return entry
        for entry in self.shipped:
            if entry.key.without_versions == key.without_versions:
                return entry
        return None


def cache_path() -> Path:
    """Return this machine's file: the environment says where, as the XDG directories do."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser() / "kernels.json"
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base).expanduser() if base else Path.home() / ".cache"
    return folder / "megablocks_utils" / "kernels.json"


def read_measurements() -> Measurements:
    """Read what is shipped and what is on disk; a damaged file is named and counts as empty."""
    path, shipped = cache_path(), tuple(read_entries(SHIPPED_PATH))
    try:
        return Measurements(tuple(read_entries(path)), shipped)
    except ConfigurationError as error:
        return Measurements((), shipped, str(error).rstrip("."))


def read_entries(path: Path) -> list[Entry]:
    """Read a file of measurements; none where there is no such file.

    Raises:
        ConfigurationError: a file that cannot be read or that is not one of ours.
    """
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(payload, dict) or payload.get("version") != _VERSION:
            raise ValueError(f"its version is not {_VERSION}")
        return [Entry.from_json(entry) for entry in payload["entries"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigurationError(
            f"the measurements in {path} cannot be read: {error.strerror or error}."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is damaged, or not a file of measurements that this version can read "
            f"({error}); remove it, or name another folder in {CACHE_VARIABLE}."
        ) from error


def store_entry(entry: Entry, path: Path) -> None:
    """Put a measurement in a file in place of an older one of the same key; all others stay.

    The file is complete at any moment, and of several processes that write at once each one's
    entry is kept.

    Raises:
        ConfigurationError: the file is damaged or cannot be written; it is left as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            kept = [other for other in read_entries(path) if other.key != entry.key]
            entries = [other.as_json() for other in (*kept, entry)]
            write_json_atomically(path, {"version": _VERSION, "entries": entries})
    except OSError as error:
        raise ConfigurationError(
            f"the measurements cannot be written to {path}: {error.strerror or error}; name another"
            f" folder in {CACHE_VARIABLE}."
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time read, add and write; a killed one's lock ends with it."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
