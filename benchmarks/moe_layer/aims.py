"""The aims of the project for one layer, and whether the measured rows reach them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.harness.outcome import MEASURED
from benchmarks.harness.record import Row
from benchmarks.moe_layer.cases import FULL, GPT_OSS, LORA16, MIXTRAL, QWEN3
from benchmarks.moe_layer.contenders import BASELINE, OURS, SCATTERMOE, TITLES
from megablocks_utils.byte_units import GIB

NUM_TOKENS = 16384
LARGE = (MIXTRAL, QWEN3, GPT_OSS)
LEAST_FLOOR_SHARE = {MIXTRAL.name: 0.60, QWEN3.name: 0.50}
MOST_SAVED_GIB = {MIXTRAL.name: 1.88, QWEN3.name: 0.44}


@dataclass(frozen=True)
class Aim:
    """One aim: what is wanted, what was seen, and whether that is enough (None: not measured)."""

    text: str
    wanted: str
    seen: str
    is_reached: bool | None

    def line(self) -> str:
        """Say it in a line of Markdown."""
        word = {True: "reached", False: "**missed**", None: "not measured"}[self.is_reached]
        return f"- {self.text}: {self.wanted}; {self.seen}: {word}"


def gpu_aims(rows: Iterable[Row]) -> list[Aim]:
    """Return the aims for one H100, even routing, 16384 tokens."""
    table = _Table(rows)
    aims = [table.faster(shape.name, LORA16.name, BASELINE, 1.5) for shape in LARGE]
    aims += [
        table.floor_share(name, LORA16.name, share) for name, share in LEAST_FLOOR_SHARE.items()
    ]
    for other, factor in ((BASELINE, 1.1), (SCATTERMOE, 1.3)):
        aims += [table.faster(shape.name, FULL.name, other, factor) for shape in LARGE]
    for mode in (LORA16.name, FULL.name):
        aims += [table.saved(name, mode, most) for name, most in MOST_SAVED_GIB.items()]
    return aims


def cpu_aims(rows: Iterable[Row]) -> Iterator[Aim]:
    """Yield the aims on a CPU: full training loses nothing, frozen experts gain."""
    for row in rows:
        case = row["case"]
        for other, compared in row["against"].items():
            ratio = compared["ratio"]["median"]
            is_full = case["mode"] == FULL.name
            text = f"{case['name']}, {case['mode']}, {case['dtype']}, {TITLES[other]} / ours"
            wanted = "at least 1.0" if is_full else "over 1.0"
            yield Aim(text, wanted, f"{ratio:.2f}", ratio >= 1.0 if is_full else ratio > 1.0)


class _Table:
    """Rows of even routing by shape, mode and contender."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {
            (row["case"]["name"], row["case"]["mode"], row["side"]): row
            for row in rows
            if row["case"]["routing"] == "uniform" and row["case"]["tokens"] == NUM_TOKENS
        }

    def faster(self, shape: str, mode: str, other: str, factor: float) -> Aim:
        text = f"{shape}, {mode}: {TITLES[OURS]} against {TITLES[other]}, forward and backward"
        wanted = f"at least {factor} x"
        ours, theirs = self._get(shape, mode, OURS), self._get(shape, mode, other)
        if isinstance(ours, str):
            return Aim(text, wanted, ours, None)
        if isinstance(theirs, str):
            return Aim(text, wanted, theirs, None)
        ratio = _step_ms(theirs) / _step_ms(ours)
        return Aim(text, wanted, f"{ratio:.2f} x", ratio >= factor)

    def floor_share(self, shape: str, mode: str, least: float) -> Aim:
        text = f"{shape}, {mode}: share of the H100's floor, forward and backward"
        wanted, row = f"at least {least:.0%}", self._get(shape, mode, OURS)
        if isinstance(row, str):
            return Aim(text, wanted, row, None)
        share = row["derived"]["forward_backward"]["share_h100"]
        return Aim(text, wanted, f"{share:.1%}", share >= least)

    def saved(self, shape: str, mode: str, most_gib: float) -> Aim:
        text = f"{shape}, {mode}: saved for backward"
        wanted, row = f"at most {most_gib} GiB", self._get(shape, mode, OURS)
        if isinstance(row, str):
            return Aim(text, wanted, row, None)
        gib = row["saved_bytes"] / GIB
        other = self._get(shape, mode, BASELINE)
        seen = f"{gib:.2f} GiB"
        if not isinstance(other, str):
            seen += f" ({TITLES[BASELINE]}: {other['saved_bytes'] / GIB:.2f})"
        return Aim(text, wanted, seen, round(gib, 2) <= most_gib)

    def _get(self, shape: str, mode: str, name: str) -> Row | str:
        """Return a measured row, or why there is none."""
        row = self._rows.get((shape, mode, name))
        if row is None:
            return f"no row of {TITLES[name]}"
        if row["status"] != MEASURED:
            return f"{TITLES[name]} {row['status']}: {row['reason']}"
        return row


def _step_ms(row: Row) -> float:
    return row["ms"]["forward_backward"]["median"]
