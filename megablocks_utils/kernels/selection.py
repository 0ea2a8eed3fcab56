"""One switch for the ways to run the same experts, decided once, with the same signature for all.

A backend takes tokens and the experts they are routed to, and returns their results. `auto` says
what it chose and why; a backend that is named but cannot run is an error, never a silent change to
another. Deciding is apart from loading, so that one rank can decide for all.
"""

from dataclasses import dataclass

from megablocks_utils.kernels.available import ExpertBackend, find_obstacle, load, refuse
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
    "KernelChoice",
    "KernelDecision",
    "choose_backend",
    "decide_backend",
    "find_obstacle",
    "load_backend",
]


@dataclass(frozen=True)
class KernelDecision:
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
class KernelChoice:
    """A backend, its name and the reason it was taken."""

    name: str
    reason: str
    run: ExpertBackend


def choose_backend(
    kernel: str,
    shapes: ExpertShapes,
    device: DeviceFacts | None = None,
    measurements: Measurements | None = None,
) -> KernelChoice:
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
    return load_backend(decide_backend(kernel, shapes, device, measurements))


def decide_backend(
    kernel: str,
    shapes: ExpertShapes,
    device: DeviceFacts,
    measurements: Measurements | None = None,
) -> KernelDecision:
    """Decide what `choose_backend` loads.

    Raises:
        UserError: as `choose_backend`.
    """
    if kernel == "auto":
        return _decide_auto(shapes, device, measurements)
    refuse(kernel, shapes, device)
    reason = "named by --kernel"
    if kernel != "triton" or shapes.device_type != "cuda":
        return KernelDecision(kernel, reason)
    measurements = measurements or read_measurements()
    entry = measurements.find(build_key(shapes, device))
    if entry is None:
        return KernelDecision(kernel, reason + _problem(measurements))
    reason += f", with the tiles measured {entry.date}{_problem(measurements)}"
    return KernelDecision(kernel, reason, entry.tiles)


def load_backend(decision: KernelDecision) -> KernelChoice:
    """Import what was decided for."""
    return KernelChoice(decision.name, decision.reason, load(decision.name, decision.tiles))


def _decide_auto(
    shapes: ExpertShapes, device: DeviceFacts, measurements: Measurements | None
) -> KernelDecision:
    """Take our Triton kernels where they were measured to win, and else what torch has."""
    obstacle = find_obstacle("grouped_mm", shapes, device)
    portable = "eager" if obstacle else "grouped_mm"
    why = obstacle or "torch.nn.functional.grouped_mm runs these shapes"
    if shapes.device_type != "cuda":
        return KernelDecision(portable, f"auto: {why}")
    obstacle = find_obstacle("triton", shapes, device)
    if obstacle is not None:
        return KernelDecision(portable, f"auto: {why}; {obstacle}")
    measurements = measurements or read_measurements()
    key = build_key(shapes, device)
    entry = measurements.find(key)
    if entry is None:
        reason = f"auto: {why}; {_describe_gap(key, measurements)}{_problem(measurements)}"
        return KernelDecision(portable, reason)
    reason = f"auto: {_describe(entry)}{_problem(measurements)}"
    if entry.winner == "triton":
        return KernelDecision("triton", reason, entry.tiles)
    return KernelDecision(portable, reason)


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
