"""What a profiler's trace says of a step: kernels, gaps between them, waits, and shares of parts.

Works on the events of torch's Chrome trace. The part that a host event belongs to is that of the
annotation around it; one in the backward pass belongs to where its forward operator was, to which
torch links it. A kernel belongs to the host call that launched it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXPERTS, ATTENTION, OPTIMIZER, OTHER = PARTS = ("experts", "attention", "optimizer", "other")
_OPTIMIZER_PREFIX = "Optimizer.step"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_LINK = "fwdbwd"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")
_LONG_GAP_US = 10.0
Event = Mapping[str, Any]
Place = tuple[int, int, float]
"""Process, thread and start of a host event."""


@dataclass(frozen=True)
class Units:
    """What figures are divided by: micro-steps of the trace, and layers of the model."""

    steps: int
    micro_steps: int
    layers: int

    @property
    def layer_passes(self) -> int:
        """Passes through a layer, forward and backward as one."""
        return self.micro_steps * self.layers


def summarise(events: Sequence[Event], units: Units) -> dict[str, Any]:
    """Return the figures of a trace.

    Returns:
        `host`: shares of the host's time by part, and operators and waits for the device, by part
        and per layer. `device`: None without kernels, else shares of the kernels' time by part,
        kernels by part and per layer, seconds of a step, and how much of it no kernel ran.
    """
    parts = find_parts(events)
    host = [event for event in events if event.get("cat") in _ON_HOST]
    on_device = [event for event in events if event.get("cat") in _ON_DEVICE]
    return {
        "steps": units.steps,
        "micro_steps": units.micro_steps,
        "layers": units.layers,
        "host": _summarise_host(host, parts, units),
        "device": _summarise_device(on_device, host, parts, units) if on_device else None,
    }


def find_parts(events: Iterable[Event]) -> dict[int, str]:
    """Return the part of each host event, by the `id` of its object."""
    host, links = [], []
    for event in events:
        if event.get("cat") in _ON_HOST:
            host.append(event)
        elif event.get("cat") == _LINK:
            links.append(event)
    around = _walk(host, {})
    part_at = {_place(event): around[id(event)] for event in host}
    forward = {link["id"]: part_at.get(_place(link)) for link in links if link["ph"] == "s"}
    backward = {_place(link): forward.get(link["id"]) for link in links if link["ph"] == "f"}
    return _walk(host, {place: part for place, part in backward.items() if part is not None})


def _walk(host: Iterable[Event], backward: Mapping[Place, str]) -> dict[int, str]:
    """Return the part of each event: its own label, its forward operator's, or that around it."""
    parts: dict[int, str] = {}
    for event, around in _nest(host):
        own = _label(event) or backward.get(_place(event))
        parts[id(event)] = own or (parts[id(around)] if around is not None else OTHER)
    return parts


def _nest(host: Iterable[Event]) -> Iterator[tuple[Event, Event | None]]:
    """Yield each event with the innermost one around it on its thread."""
    threads: dict[tuple[Any, Any], list[Event]] = {}
    for event in host:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for thread in threads.values():
        stack: list[Event] = []
        for event in sorted(thread, key=lambda one: (one["ts"], -one.get("dur", 0.0))):
            while stack and _end(stack[-1]) <= event["ts"]:
                stack.pop()
            yield event, stack[-1] if stack else None
            stack.append(event)


def _summarise_host(
    host: Sequence[Event], parts: Mapping[int, str], units: Units
) -> dict[str, Any]:
    own_us = {id(event): event.get("dur", 0.0) for event in host}
    num_operators: Counter[str] = Counter()
    for event, around in _nest(host):
        if around is not None:
            # An annotation may begin inside an operator that is over before it.
            inside = min(_end(event), _end(around)) - event["ts"]
            own_us[id(around)] -= max(0.0, inside)
        num_operators[parts[id(event)]] += event["cat"] == "cpu_op"
    time_us: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for event in host:
        part = parts[id(event)]
        if event["cat"] != "user_annotation" or part != OTHER:
            time_us[part] += own_us[id(event)]
        waits[part] += event["name"] in _WAITS
    return {
        "share_of_time": _shares(time_us),
        "operators_per_layer": _per_layer(num_operators, units),
        "waits_per_layer": _per_layer(waits, units),
    }


def _summarise_device(
    on_device: Sequence[Event], host: Sequence[Event], parts: Mapping[int, str], units: Units
) -> dict[str, Any]:
    launched = {
        event["args"]["correlation"]: parts[id(event)]
        for event in host
        if event["cat"] in _LAUNCHES and "correlation" in event.get("args", {})
    }
    time_us: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in on_device:
        part = launched.get(event.get("args", {}).get("correlation"), OTHER)
        time_us[part] += event["dur"]
        kernels[part] += event["cat"] == "kernel"
    gaps = find_gaps(on_device)
    span = max(map(_end, on_device)) - min(event["ts"] for event in on_device)
    copies = [e for e in on_device if e["cat"] == "gpu_memcpy" and "DtoH" in e["name"]]
    return {
        "share_of_time": _shares(time_us),
        "kernels_per_layer": _per_layer(kernels, units),
        "copies_to_host_per_layer": len(copies) / units.layer_passes,
        "step_s": span / units.steps / 1e6,
        "idle_share": sum(gaps) / span,
        "gaps_per_layer": len(gaps) / units.layer_passes,
        "long_gaps_per_layer": sum(gap > _LONG_GAP_US for gap in gaps) / units.layer_passes,
        "longest_gap_us": max(gaps, default=0.0),
        "top_kernels": _top_kernels(on_device),
    }


def find_gaps(on_device: Iterable[Event]) -> list[float]:
    """Return the microseconds between kernels in which none ran, on any stream."""
    gaps, busy_until = [], None
    for event in sorted(on_device, key=lambda one: one["ts"]):
        if busy_until is not None and event["ts"] > busy_until:
            gaps.append(event["ts"] - busy_until)
        busy_until = _end(event) if busy_until is None else max(busy_until, _end(event))
    return gaps


def _top_kernels(on_device: Iterable[Event], most: int = 12) -> list[dict[str, Any]]:
    time_us: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in on_device:
        time_us[event["name"]] += event["dur"]
        counts[event["name"]] += 1
    total = sum(time_us.values())
    return [
        {"name": name[:120], "share": us / total, "count": counts[name]}
        for name, us in time_us.most_common(most)
    ]


def _label(event: Event) -> str | None:
    name = event["name"]
    if event["cat"] != "user_annotation":
        return None
    if name in (EXPERTS, ATTENTION):
        return str(name)
    return OPTIMIZER if name.startswith(_OPTIMIZER_PREFIX) else None


def _place(event: Event) -> Place:
    return event["pid"], event["tid"], event["ts"]


def _end(event: Event) -> float:
    return float(event["ts"] + event.get("dur", 0.0))


def _shares(time_us: Mapping[str, float]) -> dict[str, float]:
    total = sum(time_us.values())
    return {part: time_us.get(part, 0.0) / total if total else 0.0 for part in PARTS}


def _per_layer(counts: Mapping[str, int], units: Units) -> dict[str, float]:
    return {part: counts.get(part, 0) / units.layer_passes for part in PARTS}
