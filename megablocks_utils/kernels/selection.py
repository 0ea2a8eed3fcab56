"""One switch for the ways to run the same experts, decided once, with the same signature for all.

A backend takes tokens and the experts they are routed to, and returns their results. `auto` says
what it chose and why; a backend that is named but cannot run is an error, never a silent change to
another. Deciding is apart from loading, so that one rank can decide for all.
"""

from dataclasses import dataclass

from megablocks_utils.kernels.available import ExpertBackend, find_unsupported_reason, load, refuse
from megablocks_utils.kernels.device import DeviceFacts, read_device_facts
from megablocks_utils.kernels.fused.tiles import TileTable
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import (
    Entry,
    LayerKey,
    Measurements,
    build_key,
    read_measurements,
)

__all__ = [
    "ExpertBackend",
    "ExpertShapes",
    "LoadedBackend",
    "BackendSelection",
    "select_and_load_backend",
    "select_backend",
    "find_unsupported_reason",
    "load_backend",
]


@dataclass(frozen=True)
class BackendSelection:
    """What one rank decides for all: plain data that can be sent.

    Attributes:
        name: of the backend.
        reason: why that one.
        tiles: what a search found for our Triton kernels; None takes their own table.
    """

    name: str
    reason: str
    tiles: TileTable | None = None


@dataclass(frozen=True)
class LoadedBackend:
    """A backend, its name and the reason it was taken."""

    name: str
    reason: str
    run: ExpertBackend


def select_and_load_backend(
    kernel: str,
    shapes: ExpertShapes,
    device: DeviceFacts | None = None,
    measurements: Measurements | None = None,
) -> LoadedBackend:
    """Resolve `--kernel` for the experts at hand, in one process.

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
) -> BackendSelection:
    """Decide what `select_and_load_backend` loads.

    Raises:
        UserError: as `select_and_load_backend`.
    """
    if kernel == "auto":
        return _decide_auto(shapes, device, measurements)
    refuse(kernel, shapes, device)
    reason = "named by --kernel"
    if kernel != "triton" or shapes.device_type != "cuda":
        return BackendSelection(kernel, reason)
    measurements = measurements or read_measurements()
    entry = measurements.find(build_key(shapes, device))
    if entry is None:
        return BackendSelection(kernel, reason + _problem(measurements))
    reason += f", with the tiles measured {entry.date}{_problem(measurements)}"
    return BackendSelection(kernel, reason, entry.tiles)


def load_backend(decision: BackendSelection) -> LoadedBackend:
    """Import what was decided for."""
    return LoadedBackend(decision.name, decision.reason, load(decision.name, decision.tiles))


def _decide_auto(
    shapes: ExpertShapes, device: DeviceFacts, measurements: Measurements | None
) -> BackendSelection:
    """Take our Triton kernels where they were measured to win, and else what torch has."""
    unsupported_reason = find_unsupported_reason("grouped_mm", shapes, device)
    portable = "eager" if unsupported_reason else "grouped_mm"
    why = unsupported_reason or "torch.nn.functional.grouped_mm runs these shapes"
    if shapes.device_type != "cuda":
        return BackendSelection(portable, f"auto: {why}")
    unsupported_reason = find_unsupported_reason("triton", shapes, device)
    if unsupported_reason is not None:
        return BackendSelection(portable, f"auto: {why}; {unsupported_reason}")
    measurements = measurements or read_measurements()
    key = build_key(shapes, device)
    entry = measurements.find(key)
    if entry is None:
        reason = f"auto: {why}; {_describe_gap(key, measurements)}{_problem(measurements)}"
        return BackendSelection(portable, reason)
    reason = f"auto: {_describe(entry)}{_problem(measurements)}"
    if entry.winner == "triton":
        return BackendSelection("triton", reason, entry.tiles)
    return BackendSelection(portable, reason)


def _problem(measurements: Measurements) -> str:
    return "" if measurements.problem is None else f"; {measurements.problem}"


def _describe_gap(key: LayerKey | None, measurements: Measurements) -> str:
    """Say why no measurement speaks for our Triton kernels."""
    if key is None:
        return "how many rows the experts get is not known, so no measurement was looked up"
    shipped = "" if measurements.shipped else ", and none are shipped yet"
    return (
        f"triton was not measured here for these experts, {key.mode}, with about {key.rows:,} rows "
        f"(python -m megablocks_utils.tune does it){shipped}"
    )


def _describe(entry: Entry) -> str:
    """Say what was measured of both."""
    key = entry.key
    sides = {"triton": entry.triton_ms, "grouped_mm": entry.grouped_mm_ms}
    loser = next(name for name in sides if name != entry.winner)
    times = {n: "out of memory" if ms is None else f"{ms:.2f} ms" for n, ms in sides.items()}
    return (
        f"{entry.winner} was measured faster than {loser}, {times[entry.winner]} to {times[loser]} "
        f"a layer ({entry.date}, {key.gpu}, torch {key.torch}, triton {key.triton}, "
        f"about {key.rows:,} rows)"
    )
