"""One switch for the ways to run the same experts, decided once, with the same signature for all.

`auto` takes the fastest backend that was measured, and says what it compared; a backend that is
named but cannot run is an error, never a silent change to another. Selecting is apart from loading,
so that one rank can select for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megablocks_utils.config.backends import AUTO
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.backends.backend_table import BACKENDS, check_backend
from megablocks_utils.kernels.backends.packed import serve_format
from megablocks_utils.kernels.device import DeviceFacts, read_device_facts
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import (
    Entry,
    LayerKey,
    Measurements,
    build_key,
    read_measurements,
)

__all__ = [
    "BackendSelection",
    "LoadedBackend",
    "load_backend",
    "select_and_load_backend",
    "select_backend",
]

_UNMEASURED = ("grouped_mm", "triton", "eager")
"""What `auto` takes where nothing was measured: the first that can run and is not known as slow."""


@dataclass(frozen=True)
class BackendSelection:
    """What one rank selects for all: plain data that can be sent.

    Attributes:
        name: of the backend.
        reason: why that one.
        tiles: what a search found for our Triton kernels; None takes their own table.
        alternative: what `auto` takes should that one fail its check; None: nothing.
    """

    name: str
    reason: str
    tiles: TileTable | None = None
    alternative: str | None = None


@dataclass(frozen=True)
class LoadedBackend:
    """A backend, its name and the reason it was selected; and its `alternative`."""

    name: str
    reason: str
    run: ExpertBackend
    alternative: str | None = None

    def run_for(self, weight_format: str | None) -> ExpertBackend:
        """Return what runs experts that are packed in a format, or that are not."""
        return serve_format(BACKENDS[self.name], self.run, weight_format)


def select_and_load_backend(
    kernel: str,
    shapes: ExpertShapes,
    device: DeviceFacts | None = None,
    measurements: Measurements | None = None,
) -> LoadedBackend:
    """Select and load a backend for the experts at hand, in one process.

    Args:
        kernel: `auto` or the name of a backend.
        shapes: the experts.
        device: where they run; None looks.
        measurements: what `auto` may rely on; None reads them where it matters.

    Raises:
        ConfigurationError: the named backend is unknown here or cannot run these experts.
        MissingKernelError: it is not installed.
    """
    device = device or read_device_facts(shapes.device_type)
    return load_backend(select_backend(kernel, shapes, device, measurements))


def select_backend(
    kernel: str,
    shapes: ExpertShapes,
    device: DeviceFacts,
    measurements: Measurements | None = None,
    others: Sequence[ExpertShapes] = (),
) -> BackendSelection:
    """Select what `select_and_load_backend` loads.

    Args:
        kernel: as there.
        shapes: as there.
        device: as there.
        measurements: as there.
        others: experts of other layers that differ; one backend runs all of them.

    Raises:
        UserError: as `select_and_load_backend`.
    """
    if kernel == AUTO:
        return _select_fastest([shapes, *others], device, measurements)
    for kind in (shapes, *others):
        check_backend(kernel, kind, device)
    reason = "asked for by name"
    if not BACKENDS[kernel].takes_tiles or shapes.device_type != "cuda":
        return BackendSelection(kernel, reason)
    measurements = measurements or read_measurements()
    entry = measurements.find(build_key(shapes, device))
    if entry is None or entry.tiles is None:
        return BackendSelection(kernel, reason + _describe_problem(measurements))
    reason += f", with the tiles measured {entry.date}{_describe_problem(measurements)}"
    return BackendSelection(kernel, reason, entry.tiles)


def load_backend(selection: BackendSelection) -> LoadedBackend:
    """Import what was selected."""
    run = BACKENDS[selection.name].load(selection.tiles)
    return LoadedBackend(selection.name, selection.reason, run, selection.alternative)


def _select_fastest(
    kinds: Sequence[ExpertShapes], device: DeviceFacts, measurements: Measurements | None
) -> BackendSelection:
    """Take the fastest backend that was measured for the first kind and can run all of them."""
    reasons = {
        name: next(filter(None, (b.find_unsupported_reason(s, device) for s in kinds)), None)
        for name, b in BACKENDS.items()
    }
    shapes = kinds[0]
    able = [name for name, reason in reasons.items() if reason is None]
    if shapes.device_type != "cuda":
        able = [name for name in able if name != "triton"]  # interpreted, for tests
    fallback, why = _choose_unmeasured(able, reasons, kinds, device)
    if shapes.device_type != "cuda":
        return BackendSelection(fallback, f"auto: {why}")
    measurements = measurements or read_measurements()
    key = build_key(shapes, device)
    entry = measurements.find(key)
    problem = _describe_problem(measurements)
    ranked = [] if entry is None else [pair for pair in entry.ranking if pair[1] in able]
    if entry is None or not ranked:
        gap = _describe_gap(key, measurements)
        other = _find_alternative(fallback, able)
        return BackendSelection(fallback, f"auto: {why}; {gap}{problem}", alternative=other)
    fastest = ranked[0][1]
    tiles = entry.tiles if BACKENDS[fastest].takes_tiles else None
    reason = f"auto: {_describe(entry, *ranked)}{problem}"
    return BackendSelection(fastest, reason, tiles, _find_alternative(fastest, able))


def _find_alternative(name: str, able: Sequence[str]) -> str | None:
    """Return another fast backend that can run; not `eager`, which somebody must ask for."""
    return next((n for n in _UNMEASURED if n in able and n not in (name, "eager")), None)


def _choose_unmeasured(
    able: Sequence[str],
    reasons: Mapping[str, str | None],
    kinds: Sequence[ExpertShapes],
    device: DeviceFacts,
) -> tuple[str, str]:
    """Return what runs these experts though nothing was measured, and why."""
    slow = {
        name: next(filter(None, (BACKENDS[name].find_slowness(s, device) for s in kinds)), None)
        for name in able
    }
    ranked = [name for name in _UNMEASURED if name in able]
    fallback = min(ranked, key=lambda name: (name == "eager", slow[name] is not None))
    first = _UNMEASURED[0]
    return fallback, reasons[first] or slow[first] or f"{fallback} runs these experts"


def _describe_problem(measurements: Measurements) -> str:
    return "" if measurements.problem is None else f"; {measurements.problem}"


def _describe_gap(key: LayerKey | None, measurements: Measurements) -> str:
    """Say why no measurement was used."""
    if key is None:
        return "how many rows the experts get is not known, so no measurement was looked up"
    shipped = "" if measurements.shipped else ", and none are shipped yet"
    return (
        f"no kernel was measured here for these experts, {key.mode}, with about {key.rows:,} rows "
        f"(python -m megablocks_utils.tune does it){shipped}"
    )


def _describe(entry: Entry, fastest: tuple[float, str], *slower: tuple[float, str]) -> str:
    """Say what was compared, and what of it does not count here."""
    key, (fastest_ms, name) = entry.key, fastest
    compared = [f"{other} {time_ms:.2f} ms" for time_ms, other in slower]
    for other, time_ms in entry.times_ms.items():
        if time_ms is None:
            compared.append(f"{other} out of memory")
        elif (time_ms, other) not in (fastest, *slower):
            compared.append(f"{other} {time_ms:.2f} ms, but it cannot run here")
    return (
        f"{name} was measured fastest, {fastest_ms:.2f} ms a layer "
        f"({', '.join([*compared, entry.date])}, {key.gpu}, torch {key.torch}, triton "
        f"{key.triton}, about {key.rows:,} rows)"
    )
