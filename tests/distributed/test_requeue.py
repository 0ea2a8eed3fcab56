"""One command for start and requeue: it starts, stops for its time, resumes, and ends once."""

from unittest import mock

import train_accelerate_fsdp2
import train_fsdp1
from megablocks_utils.processes import interruption
from megablocks_utils.processes.time_limit import TimeLimit
from megablocks_utils.training.report.metrics import read_metrics
from tests.support.argv import keep_last
from tests.support.parity import Layout, ParityCase

SCRIPTS = {"fsdp2": train_accelerate_fsdp2, "fsdp1": train_fsdp1}
ASKED = 3  # micro-steps of two a step: the second step is left


def _run(rank, script, argv, asks_to_stop):
    """Call a script; the time of rank 1 alone is up when it is asked for the third time."""
    answers = iter([False] * (ASKED - 1) + [True])

    def is_nearly_up(self, *, num_saves):
        return asks_to_stop and rank == 1 and next(answers)

    # As where a micro-step takes seconds: FSDP1 is asked within the third step.
    long_steps = mock.patch.object(interruption, "_ASK_EVERY_MS", 0)
    with long_steps, mock.patch.object(TimeLimit, "is_nearly_up", is_nearly_up):
        SCRIPTS[script].main(keep_last(argv))


def _series(folder):
    steps = read_metrics(folder / "metrics.jsonl")
    return [(s.step, s.loss, s.grad_norm, s.learning_rate) for s in steps]


def test_start_stop_resume_and_end(pools, parity_folder, tmp_path):
    for script, expert_dp in (("fsdp2", "shard"), ("fsdp1", "replicate")):
        case = ParityCase(
            Layout(2, 2, expert_dp), num_steps=2, accumulation=2, checkpointing="False"
        )
        whole, folder = tmp_path / f"{script}-whole", tmp_path / script
        argv = [*parity_folder.argv(case), "--debug", "False", "--output_dir"]
        requeued = [*argv, str(folder), "--time_limit", "1h", "--resume_from_checkpoint", "auto"]
        pools[2].run(_run, script, [*argv, str(whole)], False, timeout=120)
        pools[2].run(_run, script, requeued, True, timeout=120)
        stopped = _series(folder)
        assert len(stopped) == 1 and not (folder / "run.json").exists()
        assert [path.name for path in folder.glob("checkpoint-[0-9]*")] == ["checkpoint-1"]
        pools[2].run(_run, script, requeued, False, timeout=120)
        assert _series(folder) == _series(whole)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        pools[2].run(_run, script, requeued, False, timeout=120)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
