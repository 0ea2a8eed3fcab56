"""Kill runs with SIGKILL at random moments, go on with each, compare with an undisturbed one.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m tests.faults.kill --runs 100

Four CPU ranks train a tiny Mixtral with both scripts. SIGKILL leaves what the kernel has been
handed, so this proves the order of writes and renames, not what a loss of power leaves.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.harness.provenance import build_provenance
from megablocks_utils.files import write_json_atomically
from tests.faults.cases import PHASES, TooLate, draw_case, play
from tests.faults.ground import NUM_STEPS, OPTIONS, SAVE_STEPS, WORLD_SIZE, Ground
from tests.faults.ranks import SCRIPTS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
ROWS_NAME = "rows.jsonl"
VICTIMS = ("all", "rank 0", "other")
MAX_DRAWS = 5


class Series:
    """Play numbered runs, and keep a row of each in a file, so that it can be gone on with.

    Args:
        folder: for all of it.
        seed: of the draws.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._ground = Ground(folder)
        self._rows_path = folder / ROWS_NAME
        self._seed = seed
        self._lock = Lock()

    def play(self, number: int) -> dict[str, Any]:
        """Play one run and note it down."""
        rng = random.Random(f"{self._seed} {number}")
        for draw in range(MAX_DRAWS):
            try:
                row = play(self._ground, draw_case(rng), f"run-{number:03d}")
            except TooLate:
                continue
            row = {"number": number, "draws": draw + 1, **row}
            with self._lock, self._rows_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            return row
        raise RuntimeError(f"run {number} was over {MAX_DRAWS} times before it was killed")

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows so far, by number."""
        if not self._rows_path.is_file():
            return []
        rows = [json.loads(line) for line in self._rows_path.read_text().splitlines()]
        return sorted(rows, key=lambda row: row["number"])

    def run(self, num_runs: int, num_jobs: int, console: Console) -> None:
        """Play what is not in the file yet, so many at a time."""
        for script in SCRIPTS:
            self._ground.reference(script)
        done = {row["number"] for row in self.rows()}
        with ThreadPoolExecutor(num_jobs) as pool:
            for row in pool.map(self.play, [n for n in range(num_runs) if n not in done]):
                words = "ok" if row["is_good"] else "WRONG"
                console.print(
                    f"{row['number']:3d} {describe_kind(row)}, {row['phase']}, "
                    f"from {row['resumed_from']}: {words}"
                )


def describe_kind(row: dict[str, Any]) -> str:
    """Return script, way of saving and victim of a row in words."""
    case = row["case"]
    return f"{case['script']} {'async' if case['is_async'] else 'sync'} {victim_of(row)}"


def victim_of(row: dict[str, Any]) -> str:
    """Return who was killed, as one of `VICTIMS`."""
    victims = row["case"]["victims"]
    return "all" if len(victims) > 1 else "other" if victims[0] else "rank 0"


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and times over all rows."""
    noticed = [row["noticed_s"] for row in rows if row["noticed_s"] is not None]
    ended = [row["ended_s"] for row in rows if victim_of(row) != "all"]
    return {
        "runs": len(rows),
        "equal": sum(row["is_equal"] for row in rows),
        "good": sum(row["is_good"] for row in rows),
        "damaged_checkpoints": sum(len(row["damaged"]) for row in rows),
        "half_written_left": sum(len(row["incomplete"]) for row in rows),
        "half_written_unreported": sum(len(row["unreported"]) for row in rows),
        "resumed_from_a_checkpoint": sum(row["resumed_from"] is not None for row in rows),
        "runs_with_survivors": len(ended),
        "sentences_about_a_lost_rank": sum(len(row["losses"]) for row in rows),
        "seconds_to_notice": _spread(noticed),
        "seconds_to_the_end_of_all": _spread(ended),
        "by_phase": {phase: _count_by_kind(rows, phase) for phase in PHASES},
    }


def build_record(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for the results: its sentences name hosts and folders, so only their number."""
    return {**row, "losses": len(row["losses"])}


def build_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the fault table as Markdown: a line for each phase and kind of victim."""
    lines = ["| killed during | who | runs | FSDP1 | async | resumed | equal | s to notice |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for phase in PHASES:
        for victim in VICTIMS:
            chosen = [r for r in rows if r["phase"] == phase and victim_of(r) == victim]
            if chosen:
                lines.append(_line(phase, victim, chosen))
    return "\n".join([*lines, _line("**any**", "**any**", rows)])


def _line(phase: str, victim: str, rows: Sequence[dict[str, Any]]) -> str:
    noticed = [row["noticed_s"] for row in rows if row["noticed_s"] is not None]
    seconds = f"{statistics.median(noticed):.1f} (max {max(noticed):.1f})" if noticed else ""
    cells = [
        *(phase, victim, len(rows)),
        sum(row["case"]["script"] == "fsdp1" for row in rows),
        sum(row["case"]["is_async"] for row in rows),
        sum(row["resumed_from"] is not None for row in rows),
        f"{sum(row['is_equal'] for row in rows)} of {len(rows)}",
        seconds,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _count_by_kind(rows: Iterable[dict[str, Any]], phase: str) -> dict[str, int]:
    return dict(sorted(Counter(describe_kind(r) for r in rows if r["phase"] == phase).items()))


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "n": len(values),
        "min": round(min(values), 2),
        "median": round(statistics.median(values), 2),
        "max": round(max(values), 2),
    }


def main(argv: list[str]) -> int:
    """Play, show the table, and write the results once all runs are done."""
    parser = argparse.ArgumentParser(prog="tests.faults.kill", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a folder to keep, and to resume from")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        series = Series(args.work or Path(temporary), args.seed)
        series.run(args.runs, args.jobs, console)
        rows = series.rows()
    summary = summarize(rows)
    settings = {"options": OPTIONS, "ranks": WORLD_SIZE, "num_steps": NUM_STEPS}
    settings |= {"save_steps": SAVE_STEPS, "seed": args.seed, "jobs": args.jobs}
    words = ["--runs", str(args.runs), "--jobs", str(args.jobs), "--seed", str(args.seed)]
    provenance = build_provenance("tests.faults.kill", words, **settings)
    records = [build_record(row) for row in rows]
    write_json_atomically(args.output, provenance | {"summary": summary, "rows": records})
    console.print(Markdown(build_table(rows)))
    console.print_json(data=summary)
    return int(summary["good"] < len(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
