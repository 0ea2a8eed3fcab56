"""How long training waits while a checkpoint is written: at once, and in the background.

    PYTHONPATH=. python -m benchmarks.saving

Full fine-tuning of a random Mixtral on two CPU ranks (ep 2), through the FSDP2 script's own loop: a
checkpoint after every third step. Writes benchmarks/results/saving.json and prints it as Markdown.
With --smoke a tiny model, to see that it runs.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import as_words
from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import open_rank_pools
from benchmarks.harness.record import Record
from benchmarks.harness.report import markdown_table, say, show
from benchmarks.harness.timing import spread
from benchmarks.harness.workload import Workload, save_workload
from megablocks_utils.training.checkpointer import Checkpointer
from megablocks_utils.training.loop import fit
from megablocks_utils.training.recorder import RunRecorder
from megablocks_utils.training.resume.run_state import RunState
from tests.support.parity import build_run
from tests.support.rank_pool import RankPool

RESULT = RESULTS / "saving.json"
WORLD_SIZE = 2
EVERY = 3
MODES = {"no checkpoints": (), "at once": ("False",), "in the background": ("True",)}
SMOKE = Workload(64, 96, 2, 4, vocab_size=128, num_examples=64, longest_tokens=32)


class _TimedCheckpointer(Checkpointer):
    """Note how long each call after a step takes, and when a save is over."""

    stalls_s: list[float]
    writes_s: list[float]

    def after_step(self, step: int, state: RunState) -> None:
        started_s = time.perf_counter()
        super().after_step(step, state)
        ended_s = time.perf_counter()
        if step % EVERY:
            return
        self.stalls_s.append(ended_s - started_s)
        if self._pending is None:
            self.writes_s.append(ended_s - started_s)
        else:
            self._pending.add_done_callback(
                lambda _: self.writes_s.append(time.perf_counter() - started_s)
            )


def train(rank: int, argv: list[str]) -> dict[str, list[float]]:
    """Train on one rank; return seconds of stalls, of whole saves and of steps."""
    setup, state = build_run(argv)
    recorder = RunRecorder(setup)
    checkpointer = _TimedCheckpointer(setup, recorder.metrics_path)
    checkpointer.stalls_s, checkpointer.writes_s = [], []
    steps_s = []
    with recorder, checkpointer:
        for metrics in fit(state, setup, checkpointer):
            recorder.record(metrics)
            steps_s.append(metrics.step_time_s)
    return {
        "stalls_s": checkpointer.stalls_s,
        "writes_s": checkpointer.writes_s,
        "steps_s": steps_s[1:],  # the first one makes Adam's states
    }


def measure(
    pools: Mapping[int, RankPool], folder: Path, workload: Workload, num_saves: int
) -> dict[str, dict[str, Any]]:
    """Train once in each mode; return the slowest rank's seconds."""
    save_workload(workload, folder)
    rows: dict[str, dict[str, Any]] = {}
    for number, (mode, words) in enumerate(MODES.items()):
        argv = _arguments(folder, workload, f"run{number}", num_saves)
        if words:
            argv += ["--save_strategy", "steps", "--save_steps", str(EVERY)]
            argv += ["--save_total_limit", "1", "--async_save", *words]
        ranks = pools[WORLD_SIZE].run(train, argv, timeout=1200)
        rows[mode] = {
            name: spread([max(values) for values in zip(*(r[name] for r in ranks), strict=True)])
            for name in ranks[0]
            if ranks[0][name] and (words or name == "steps_s")
        }
        rows[mode]["checkpoint_bytes"] = _newest_bytes(folder / f"run{number}") if words else 0
        say(f"{mode}: {rows[mode]}")
    return rows


def _arguments(folder: Path, workload: Workload, name: str, num_saves: int) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.jsonl",
        "output_dir": folder / name,
        "use_megablocks_sharding": True,
        "per_device_train_batch_size": workload.per_device_batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": EVERY * num_saves,
        "report_to": "none",
    }
    return as_words(options)


def _newest_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "checkpoint-latest").resolve().iterdir())


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return medians and ranges as Markdown."""
    columns = ("checkpoints", "training waits", "a save takes", "a step takes")
    keys = ("stalls_s", "writes_s", "steps_s")
    lines = [[mode, *(_format(row.get(key)) for key in keys)] for mode, row in rows.items()]
    return markdown_table(columns, lines)


def _format(values: Mapping[str, float] | None) -> str:
    if values is None:
        return ""
    return f"{values['median']:.2f} s ({values['min']:.2f} to {values['max']:.2f})"


def main() -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model; writes no results")
    smoke = parser.parse_args().smoke
    workload, num_saves = (SMOKE, 2) if smoke else (Workload(num_layers=8), 6)
    with open_rank_pools(WORLD_SIZE) as (pools, models):
        rows = measure(pools, models.folder, workload, num_saves)
    if not smoke:
        provenance = build_provenance("benchmarks.saving", sys.argv[1:], world_size=WORLD_SIZE)
        Record(RESULT, provenance | {"rows": rows}).write()
    show(format_table(rows))


if __name__ == "__main__":
    main()
