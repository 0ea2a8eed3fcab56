"""A run under torchrun loses a rank: it is started again and goes on as if nothing had been."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megablocks_utils.training.report.metrics import read_metrics
from tests.faults.ranks import ScriptRun
from tests.support.argv import keep_last
from tests.support.parity import write_examples
from tests.support.ports import free_port
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "-m torch.distributed.run --nproc_per_node 2 --master_port {port} --max_restarts 1 "
    "train_accelerate_fsdp2.py"
)
FLAGS = (
    "--use_megablocks_sharding True --precision fp32 --max_steps 16 --save_strategy steps "
    "--save_steps 8 --per_device_train_batch_size 4 --learning_rate 1e-3 --report_to none"
)
TIMEOUT_S = 180


class Runs:
    """Start runs on one model and one data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny_model("olmoe", folder / "model")
        write_examples(folder / "data.json", 37)

    def argv(self, name: str, *words: str) -> list[str]:
        """Return the options of a run that writes to a folder of this name."""
        paths = {"model_name_or_path": "model", "data_path": "data.json", "output_dir": name}
        options = [
            w for key, value in paths.items() for w in (f"--{key}", f"{self.folder / value}")
        ]
        return [*FLAGS.split(), *words, *options]

    def run_without_launcher(self, name: str) -> None:
        """Run to the end on forked ranks, which import nothing."""
        argv, logs = self.argv(name), self.folder / "logs"
        with ScriptRun("fsdp2", argv, logs, world_size=2) as run:
            run.finish(TIMEOUT_S)

    def start(self, name: str, *words: str) -> subprocess.Popen:
        """Start a run under torchrun."""
        launcher = LAUNCHER.format(port=free_port())
        return subprocess.Popen(
            [sys.executable, *launcher.split(), *keep_last(self.argv(name, *words))],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen) -> str:
        """Wait for the end of a run that must succeed, and return what it said."""
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output
        return output

    def series(self, name: str) -> list[tuple]:
        """Return the numbers of each step that do not depend on the clock."""
        steps = read_metrics(self.folder / name / "metrics.jsonl")
        return [(s.step, s.epoch, s.loss, s.grad_norm, s.learning_rate, s.tokens) for s in steps]

    def weights(self, name: str) -> bytes:
        """Return the final model's file."""
        return (self.folder / name / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_loses_a_rank_is_restarted_and_goes_on(tmp_path):
    """One rank is killed: the other ends with one sentence, and torchrun starts both again."""
    runs = Runs(tmp_path)
    runs.run_without_launcher("whole")
    killed = runs.folder / "killed"
    process = runs.start("killed", "--save_steps", "4")
    wait_for_lines(killed / "metrics.jsonl", 6, process)
    victim = find_rank(process.pid, 1)
    os.kill(victim, signal.SIGKILL)
    output = runs.finish(process)
    sentence = (
        rf"rank 1 \(process {victim} on .+\) was lost: its process is gone. The newest complete "
        rf"checkpoint is {killed}/checkpoint-\d+; resume from it with "
        r"--resume_from_checkpoint True."
    )
    assert len(re.findall(sentence, output)) == 1
    assert "Traceback" not in output
    assert runs.series("killed") == runs.series("whole")
    assert runs.weights("killed") == runs.weights("whole")


def find_rank(launcher_pid: int, rank: int) -> int:
    """Return the process id of a rank: a child of the launcher with that RANK."""
    wanted = f"RANK={rank}".encode()
    return next(
        pid
        for pid in children_of(launcher_pid)
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


def wait_for_lines(path: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.is_file() or len(path.read_text().splitlines()) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
