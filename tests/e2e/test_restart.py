"""A run under torchrun loses a rank: it is started again and goes on as if nothing had been."""

import multiprocessing
import os
import re
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from megablocks_utils.training.report.metrics import read_metrics
from tests.faults.ranks import ScriptRun
from tests.support.argv import keep_last
from tests.support.parity import write_examples
from tests.support.ports import free_port
from tests.support.rank_pool import start_forkserver
from tests.support.tiny_models import save_tiny_model

# Its ranks are forked from a process that has imported everything, not started as interpreters.
LAUNCHER = (
    "--nproc_per_node 2 --master_port {port} --max_restarts 1 --monitor_interval 0.1 "
    "--start_method forkserver --run_path --redirects 3 --log_dir {logs} {program}"
)
PROGRAM = """
import os, sys
from pathlib import Path
from tests.faults.ranks import run_script

Path(__file__).with_name("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
run_script("train_accelerate_fsdp2", sys.argv[1:])
"""
FLAGS = (
    "--use_megablocks_sharding True --precision fp32 --max_steps 8 --save_strategy steps "
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

    def start(self, name: str, *words: str) -> BaseProcess:
        """Start a run under torchrun."""
        program, logs = self.folder / "program.py", self.folder / "torchrun"
        program.write_text(PROGRAM)
        launcher = LAUNCHER.format(port=free_port(), logs=logs, program=program)
        argv = [*launcher.split(), *keep_last(self.argv(name, *words))]
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=torchrun.main, args=(argv,))
        process.start()
        return process

    def finish(self, process: BaseProcess) -> str:
        """Wait for the end of a run that must succeed, and return what its ranks said."""
        process.join(TIMEOUT_S)
        output = self.output()
        assert process.exitcode == 0, output
        return output

    def output(self) -> str:
        """Return what all ranks of all starts have said."""
        return "".join(log.read_text() for log in (self.folder / "torchrun").rglob("*.log"))

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
    process = runs.start("killed", "--save_steps", "2")
    try:
        wait_for_lines(killed / "metrics.jsonl", 3, process)
        victim = int((runs.folder / "pid-1").read_text())
        os.kill(victim, signal.SIGKILL)
        output = runs.finish(process)
    finally:
        process.terminate()
    sentence = (
        rf"rank 1 \(process {victim} on .+\) was lost: its process is gone. The newest complete "
        rf"checkpoint is {killed}/checkpoint-\d+; resume from it with "
        r"--resume_from_checkpoint True."
    )
    assert len(re.findall(sentence, output)) == 1, output
    assert "Traceback" not in output
    assert runs.series("killed") == runs.series("whole")
    assert runs.weights("killed") == runs.weights("whole")


def wait_for_lines(path: Path, number: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.is_file() or len(path.read_text().splitlines()) < number:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
