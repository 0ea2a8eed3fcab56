"""What a run predicted of itself and what it measured, side by side."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.verdict import WORDS
from megablocks_utils.planning.model.units import format_gb

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["KEPT_BYTES", "Comparison", "build_check_table", "compare", "read_run_plan"]

KEPT_BYTES = "kept_by_c_library_bytes"
"""Key of what the C library of a run on a CPU kept of freed memory, among what was measured."""

LARGEST_BYTES = 2**63
"""No figure is as large; one that is says nothing."""


@dataclass(frozen=True)
class Comparison:
    """One figure, predicted and measured in bytes; None for what was not."""

    name: str
    predicted: int | None
    measured: int | None

    @property
    def error_percent(self) -> float | None:
        """How far the prediction is off what was measured; negative where it is too low."""
        if self.predicted is None or not self.measured:
            return None
        return 100 * (self.predicted - self.measured) / self.measured


def read_run_plan(path: str | Path) -> Mapping[str, Any]:
    """Return what a run has written under `plan` in its run.json.

    Raises:
        ConfigurationError: no such file, or one without a plan.
    """
    wanted = "it must be the run.json of a finished run that was planned"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ConfigurationError(f"--check is {path}, but that is no file; {wanted}.")
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"--check is {path}, but it cannot be read ({error.strerror}); {wanted}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"--check is {path}, but that is no valid JSON; {wanted}."
        ) from error
    plan = record.get("plan") if isinstance(record, dict) else None
    if isinstance(plan, dict) and "not_planned" in plan:
        raise ConfigurationError(
            f"--check is {path}, but that run was not planned: {plan['not_planned']}"
        )
    if not isinstance(plan, dict) or not all(
        _is_side(plan.get(name)) for name in ("predicted", "measured")
    ):
        raise ConfigurationError(f"--check is {path}, but it holds no plan; {wanted}.")
    return plan


def compare(plan: Mapping[str, Any]) -> list[Comparison]:
    """Pair what was predicted with what was measured: components, peak, and between two steps.

    On a CPU the peak is that of the process, in which the C library keeps blocks that were freed;
    what it kept is known since then, and the peak without it is a row of its own.
    """
    predicted, measured = plan["predicted"], plan["measured"]
    sides = (predicted.get("components", {}), measured.get("components", {}))
    rows = [Comparison(word, *(_bytes(side, key) for side in sides)) for key, word in WORDS.items()]
    totals = {"peak_bytes": "peak", "allocated_bytes": "allocated between steps"}
    rows += [
        Comparison(word, _bytes(predicted, key), _bytes(measured, key))
        for key, word in totals.items()
    ]
    peak, kept = _bytes(measured, "peak_bytes"), _bytes(measured, KEPT_BYTES)
    if peak is not None and kept is not None:
        rows.append(Comparison("kept by the C library", None, kept))
        rows.append(Comparison("peak without it", _bytes(predicted, "peak_bytes"), peak - kept))
    return rows


def build_check_table(plan: Mapping[str, Any]) -> "Table":
    """Lay the comparison out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "Plan against the run, on the fullest rank"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for head in ("predicted", "measured", "error"):
        table.add_column(head, justify="right")
    for row in compare(plan):
        if row.name == "peak":
            table.add_section()
        error = row.error_percent
        table.add_row(
            row.name,
            *("-" if side is None else format_gb(side) for side in (row.predicted, row.measured)),
            "-" if error is None else f"{error:+.1f} %",
        )
    return table


def _bytes(side: Mapping[str, Any], name: str) -> int | None:
    value = side.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if abs(value) < LARGEST_BYTES else None


def _is_side(side: Any) -> bool:
    return isinstance(side, dict) and isinstance(side.get("components", {}), dict)
