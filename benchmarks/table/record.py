"""The JSON file of a table: its provenance and rows, complete after every run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.outcome import MEASURED, NOT_MEASURED
from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.record import Record
from benchmarks.table.bench import Bench, predict_row
from benchmarks.table.rows import PUBLISHED_MICRO_STEPS, PUBLISHED_ON, Published, Row
from benchmarks.table.summary import (
    compare_memory,
    compare_published,
    published_ratio,
    ratio_rows,
    summarise_errors,
    summarise_runs,
    take_ratio,
)

MODULE = "benchmarks.table"


class TableRecord(Record):
    """What is known of the rows so far.

    Args:
        path: of the file.
        argv: of the command.
        rows: of the table.
        bench: how they run.
        method: what the numbers mean.
    """

    def __init__(
        self,
        path: Path,
        argv: Sequence[str],
        *,
        rows: Sequence[Row],
        bench: Bench,
        method: Mapping[str, str],
    ) -> None:
        self._rows, self._bench = rows, bench
        settings = {name: value for name, value in asdict(bench).items() if name != "mode"}
        provenance = build_provenance(
            MODULE, argv, mode=bench.mode, bench=settings, method=dict(method)
        )
        published = {"published_on": PUBLISHED_ON, "is_published": bench.is_published}
        entries = {"rows": [_describe(row, bench) for row in rows]}
        super().__init__(path, provenance | published | entries)
        self._summarise()

    def entry(self, row: Row) -> dict[str, Any]:
        """Return what is known of a row."""
        return next(entry for entry in self.rows if entry["row"] == row.name)

    def settle(self, row: Row, outcome: Mapping[str, Any]) -> None:
        """Record why a row has no numbers, and write the file."""
        self.entry(row).update(outcome, title=row.title(self._bench.ranks))
        self.write()

    def add_memory(self, row: Row, memory: Mapping[str, Any]) -> None:
        """Add a row's bytes, from a run for them alone, and write the file."""
        entry = self.entry(row)
        if memory["status"] != MEASURED:
            entry.update(memory)
        else:
            entry["weights"] = dict(memory)
        self.write()

    def add_run(self, row: Row, run: Mapping[str, Any]) -> None:
        """Add a run of a row, and write the file."""
        entry = self.entry(row)
        entry.update({"status": run["status"], "reason": run.get("reason", "")})
        entry["runs"].append(dict(run))
        self.write()

    def write(self) -> None:
        """Write the file, complete or not at all."""
        self._summarise()
        super().write()

    def _summarise(self) -> None:
        for row in self._rows:
            entry = self.entry(row)
            runs = self._measured_runs(row)
            timed = [run for run in runs if "micro_step_s" in run]
            measured = summarise_runs(timed) if timed else dict(*runs[:1])
            measured |= {k: v for k, v in entry.get("weights", {}).items() if k != "status"}
            entry["measured"] = measured or None
            entry["ratios"] = self._ratios(row, timed)
            if measured and entry["predicted"]:
                entry["against_predicted"] = compare_memory(entry["predicted"], measured)
        self.content["errors"] = self._errors()

    def _measured_runs(self, row: Row) -> list[dict[str, Any]]:
        return [run for run in self.entry(row)["runs"] if run["status"] == MEASURED]

    def _ratios(self, row: Row, timed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ratios = {}
        for name, other in ratio_rows(row, self._rows).items():
            ratios[name] = {
                "to": other.name,
                "published": published_ratio(row, other),
                "measured": take_ratio(timed, self._measured_runs(other)) if timed else None,
            }
        return ratios

    def _errors(self) -> dict[str, Any]:
        """Summarise the errors of predictions against what was published and measured."""
        found: dict[str, Any] = {}
        for key, pick in (("published_error", float), ("against_predicted", lambda x: x["error"])):
            for name in ("peak", "allocated"):
                errors = [pick(entry[key][name]) for entry in self.rows if entry.get(key)]
                found.setdefault(key, {})[name] = summarise_errors(errors)
        return found


def _describe(row: Row, bench: Bench) -> dict[str, Any]:
    """Return what is known of a row before anything runs."""
    predicted = predict_row(bench, row)
    published_error = None
    if bench.is_published and predicted is not None:
        published_error = compare_published(row, predicted)
    return {
        "row": row.name,
        "side": row.group,
        "title": row.title(bench.ranks, bench.kernel(row)),
        "notes": list(row.notes),
        "tokens_per_rank": bench.tokens,
        "published": _as_record(row.published),
        "predicted": predicted,
        "has_base": bench.has_base,
        "published_error": published_error,
        "status": NOT_MEASURED,
        "reason": "",
        "runs": [],
    }


def _as_record(published: Published | None) -> dict[str, Any] | None:
    if published is None:
        return None
    return {
        "is_oom": published.is_oom,
        "runtime_s": published.runtime_s,
        "micro_step_s": published.micro_step_s,
        "micro_step_s_is": f"inferred: runtime over {PUBLISHED_MICRO_STEPS} micro-steps",
        "peak_bytes": published.peak_bytes,
        "allocated_bytes": published.allocated_bytes,
        "is_before_zero_grad": published.is_before_zero_grad,
    }
