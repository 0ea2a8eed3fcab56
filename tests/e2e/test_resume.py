"""Both scripts as they are started: stopped at any time, they go on as if they had not been."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megablocks_utils.training.metrics import read_metrics
from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "fsdp2": "-m torch.distributed.run --nproc_per_node 2 --master_port {port} --max_restarts 1 "
    "train_accelerate_fsdp2.py",
    "fsdp1": "-m accelerate.commands.launch --num_processes 2 --main_process_port {port} "
    "--config_file accelerate.yaml train_fsdp1.py",
}
FLAGS = (
    "--use_megablocks_sharding True --precision fp32 --max_steps 40 --save_strategy steps "
    "--save_steps 16 --per_device_train_batch_size 4 --learning_rate 1e-3 --report_to none"
)
TIMEOUT_S = 180
LATEST = "checkpoint-latest"


class Runs:
    """Start runs of a script on one model and one data set."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script, self.folder = script, folder
        save_tiny_model("olmoe", folder / "model")
        write_examples(folder / "data.json", 37)

    def start(self, name: str, *words: str) -> subprocess.Popen:
        """Start a run that writes to a folder of this name."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            launcher = LAUNCHERS[self.script].format(port=probe.getsockname()[1])
        command = [sys.executable, *launcher.split(), *FLAGS.split(), *words]
        for option, value in (("model_name_or_path", "model"), ("data_path", "data.json")):
            command += [f"--{option}", f"{self.folder / value}"]
        return subprocess.Popen(
            [*command, "--output_dir", f"{self.folder / name}"],
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


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory) -> Callable[[str], Runs]:
    """Runs of a script, of which "whole" is done."""

    @cache
    def run_whole(script: str) -> Runs:
        runs = Runs(script, tmp_path_factory.mktemp(script))
        runs.finish(runs.start("whole"))
        return runs

    return run_whole


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_run_goes_on_bit_by_bit(runs_of, script):
    runs = runs_of(script)
    whole = runs.folder / "whole"
    assert names_in(whole) == ["checkpoint-16", "checkpoint-32", "checkpoint-40", LATEST]
    assert [step[0] for step in runs.series("whole")] == list(range(1, 41))

    # As if the run had died after its second checkpoint.
    half = shutil.copytree(whole, runs.folder / "half", symlinks=True)
    shutil.rmtree(half / "checkpoint-40")
    for name in ("model.safetensors", "run.json", "metrics.jsonl"):
        (half / name).unlink()
    runs.finish(runs.start("half", "--resume_from_checkpoint", "True"))
    assert runs.series("half") == runs.series("whole")
    assert runs.weights("half") == runs.weights("whole")
    assert names_in(half) == names_in(whole)
    record = json.loads((half / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["totals"]["steps"] == 40


@pytest.mark.slow
def test_a_run_whose_workers_get_sigterm_saves_and_goes_on(runs_of):
    """SIGTERM to every worker, as torchrun sends it: they save, and end with 0."""
    runs = runs_of("fsdp2")
    stopped = runs.folder / "stopped"
    process = runs.start("stopped", "--save_steps", "500")
    wait_for_lines(stopped / "metrics.jsonl", 2, process)
    for worker in children_of(process.pid):
        os.kill(worker, signal.SIGTERM)
    output = runs.finish(process)  # torchrun is content: every worker ended with 0
    checkpoint, latest = names_in(stopped)
    step = int(checkpoint.partition("-")[2])
    assert latest == LATEST
    assert 2 <= step < 40
    assert f"Stopped by SIGTERM after step {step} of 40" in output
    assert not (stopped / "model.safetensors").exists()
    assert not (stopped / "run.json").exists()

    runs.finish(runs.start("stopped", "--resume_from_checkpoint", "True"))
    assert runs.series("stopped") == runs.series("whole")
    assert runs.weights("stopped") == runs.weights("whole")


@pytest.mark.slow
def test_a_run_that_loses_a_rank_is_restarted_and_goes_on(runs_of):
    """One rank is killed: the other ends with one sentence, and torchrun starts both again."""
    runs = runs_of("fsdp2")
    killed = runs.folder / "killed"
    process = runs.start("killed", "--save_steps", "4")
    wait_for_lines(killed / "metrics.jsonl", 9, process)
    victim = find_rank(process.pid, 1)
    os.kill(victim, signal.SIGKILL)
    output = runs.finish(process)
    sentence = (
        rf"rank 1 \(process {victim} on .+\) was lost: its process is gone. The newest complete "
        rf"checkpoint is {killed}/checkpoint-\d+; go on from it with --resume_from_checkpoint True."
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


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def wait_for_lines(path: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.is_file() or len(path.read_text().splitlines()) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
