"""A rank is killed in the middle of a real run under torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "-m torch.distributed.run --standalone --nproc_per_node=2 train_accelerate_fsdp2.py"
FLAGS = (
    "--use_megablocks_sharding True --per_device_train_batch_size 1 --max_steps 100000 "
    "--precision fp32 --save_strategy steps --save_steps 100000"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model and a few tokenized examples."""
    save_tiny_model("mixtral", tmp_path / "model")
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 8
    (tmp_path / "data.json").write_text(json.dumps(examples))
    return tmp_path


def _find_rank(launcher_pid: int, rank: int) -> int:
    """Return the process id of a rank: a child of the launcher with that RANK."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(
        int(pid)
        for pid in children
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


def _wait_for_steps(folder: Path, launcher: subprocess.Popen) -> None:
    metrics = folder / "out" / "metrics.jsonl"
    limit_s = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.monotonic() < limit_s and launcher.poll() is None
        time.sleep(0.1)


def test_the_run_ends_with_one_message(folder):
    command = [sys.executable, *LAUNCH.split(), *FLAGS.split()]
    command += ["--model_name_or_path", folder / "model", "--data_path", folder / "data.json"]
    command += ["--output_dir", folder / "out"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "stderr").open("w") as errors:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=errors
        )
    try:
        _wait_for_steps(folder, launcher)
        checkpoint = folder / "out" / "checkpoint-2"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").touch()
        victim = _find_rank(launcher.pid, 1)
        os.kill(victim, signal.SIGKILL)
        start_s = time.monotonic()
        assert launcher.wait(90) == 1
        assert time.monotonic() - start_s < 60  # 3 s on an idle machine
    finally:
        launcher.terminate()
        launcher.wait(60)
    text = (folder / "stderr").read_text()
    assert re.findall(r"^rank 1 .*", text, flags=re.MULTILINE) == [
        f"rank 1 (process {victim} on {os.uname().nodename}) was lost: its process is gone. The "
        f"newest complete checkpoint is {checkpoint}; go on from it with "
        "--resume_from_checkpoint True."
    ]
    ours = [line for line in text.splitlines() if line.startswith(("[rank0]", "[rank1]"))]
    assert ours == []  # torchrun has its own traceback
