"""Whether a run that saves all the time grows: memory, open files and threads over many saves.

    PYTHONPATH=. python -m benchmarks.soak --minutes 10

A tiny Mixtral on two CPU ranks (ep 2), through the FSDP2 script's own loop: a checkpoint in the
background after every step, of which two are kept. Writes benchmarks/results/soak.json and
soak.png, and ends with exit code 1 if anything has grown since the first fifth of the time. With
--smoke, which takes seconds, it writes nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.processes import as_words
from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import open_rank_pools
from benchmarks.harness.record import Record
from benchmarks.harness.report import markdown_table, say, show
from benchmarks.harness.workload import Workload, save_workload
from megablocks_utils.byte_units import MIB
from megablocks_utils.files import publish_file
from megablocks_utils.processes.agreement import max_over_ranks
from megablocks_utils.training.checkpointer import Checkpointer
from megablocks_utils.training.loop import fit
from megablocks_utils.training.recorder import RunRecorder
from tests.support.parity import build_run

RESULT, PLOT = RESULTS / "soak.json", RESULTS / "soak.png"
WORLD_SIZE = 2
WORKLOAD = Workload(64, 96, 2, 4, vocab_size=128, num_examples=64, longest_tokens=32)
MAX_STEPS = 10**6
SAMPLE_S = 1.0
WARM_SHARE = 0.2  # of the time, in which allocators, pools and caches fill
ALLOWED = {"memory_mib": 16.0, "handles": 2.0, "threads": 1.0}
"""How much more than after the warm-up may be in use at the end, by what is measured."""

Sample = dict[str, float]


class _TimedCheckpointer(Checkpointer):
    """Stop all ranks when the time is up."""

    ends_s = 0.0

    def should_stop(self) -> bool:
        return max_over_ranks(int(time.monotonic() > self.ends_s)) > 0

    def after_stop(self, step: int, state: object) -> None:
        self.is_interrupted = True


def train(rank: int, argv: list[str], duration_s: float) -> list[Sample]:
    """Train and save until the time is up; return what this rank used, about once a second."""
    setup, state = build_run(argv)
    recorder = RunRecorder(setup)
    checkpointer = _TimedCheckpointer(setup, recorder.metrics_path)
    started_s = time.monotonic()
    checkpointer.ends_s = started_s + duration_s
    samples: list[Sample] = []
    with recorder, checkpointer:
        for metrics in fit(state, setup, checkpointer):
            recorder.record(metrics)
            elapsed_s = time.monotonic() - started_s
            if not samples or elapsed_s - samples[-1]["elapsed_s"] >= SAMPLE_S:
                samples.append({"elapsed_s": elapsed_s, "saves": metrics.step - 1, **_measure()})
    return samples


def _measure() -> Sample:
    """Return what this process uses now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") / MIB,
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def find_growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return by what is measured the median after the warm-up, that at the end, and the growth.

    Each is the median of as many samples: of the second and the last fifth of the time.
    """
    fifth = max(1, int(len(samples) * WARM_SHARE))
    early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    growth = {}
    for name in ALLOWED:
        before, after = (median(sample[name] for sample in part) for part in (early, late))
        growth[name] = {"early": before, "late": after, "growth": after - before}
    return growth


def find_violations(growth: Mapping[str, Mapping[str, float]], who: str) -> list[str]:
    """Say what has grown by more than is allowed."""
    return [
        f"{name} of {who} grew by {values['growth']:.1f}, but {ALLOWED[name]:.0f} are allowed"
        for name, values in growth.items()
        if values["growth"] > ALLOWED[name]
    ]


def soak(duration_s: float) -> dict[str, list[Sample]]:
    """Train for a while; return the samples of every rank."""
    with open_rank_pools(WORLD_SIZE) as (pools, _), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_workload(WORKLOAD, folder)
        options: dict[str, Any] = {
            "model_name_or_path": folder / "model",
            "data_path": folder / "data.jsonl",
            "output_dir": folder / "out",
            "use_megablocks_sharding": True,
            "per_device_train_batch_size": WORKLOAD.per_device_batch,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "max_steps": MAX_STEPS,
            "report_to": "none",
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "async_save": True,
        }
        timeout_s = duration_s + 300
        ranks = pools[WORLD_SIZE].run(train, as_words(options), duration_s, timeout=timeout_s)
    return {f"rank {rank}": samples for rank, samples in enumerate(ranks)}


def build_figure(ranks: Mapping[str, Sequence[Sample]]) -> Figure:
    """Draw a panel for each thing measured, a line for each rank, over the number of saves."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    titles = {"memory_mib": "memory (MiB)", "handles": "open files", "threads": "threads"}
    panels = figure.subplots(3, 1, sharex=True)
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for rank, samples in ranks.items():
            panel.plot([s["saves"] for s in samples], [s[name] for s in samples], label=rank)
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0)
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("checkpoints saved")
    panels[-1].legend(frameon=False)
    return figure


def main() -> None:
    """Measure, write, show; end with 1 where something has grown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to train")
    parser.add_argument("--smoke", action="store_true", help="a few seconds; writes no results")
    options = parser.parse_args()
    ranks = soak(5.0 if options.smoke else 60 * options.minutes)
    growth = {rank: find_growth(samples) for rank, samples in ranks.items()}
    if not options.smoke:
        provenance = build_provenance("benchmarks.soak", sys.argv[1:], world_size=WORLD_SIZE)
        Record(RESULT, provenance | {"growth": growth, "samples": ranks}).write()
        with publish_file(PLOT) as temporary:
            build_figure(ranks).savefig(temporary, format="png")
    show(format_table(ranks, growth))
    violations = [v for rank, values in growth.items() for v in find_violations(values, rank)]
    for violation in violations:
        say(violation)
    sys.exit(bool(violations))


def format_table(
    ranks: Mapping[str, Sequence[Sample]], growth: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> str:
    """Return what each rank used after the warm-up and at the end, as Markdown."""
    columns = ("", "saves", "memory (MiB)", "open files", "threads")
    lines = [
        [
            rank,
            f"{ranks[rank][-1]['saves']:,.0f}",
            *(f"{values[name]['early']:.0f} to {values[name]['late']:.0f}" for name in ALLOWED),
        ]
        for rank, values in growth.items()
    ]
    return markdown_table(columns, lines)


if __name__ == "__main__":
    main()
