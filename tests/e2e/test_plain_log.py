"""What a run and an evaluation write where there is no terminal: lines, and nothing of others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    "--use_lora all --verify_adapter True --precision fp32 --max_steps 2 --save_strategy steps "
    "--save_steps 1 --report_to none"
)


def log_of(*words: object) -> str:
    """Return all that a command writes, whose end must be good."""
    answer = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=180,
    )
    log = answer.stdout.decode()
    assert answer.returncode == 0, log
    return log


@pytest.mark.slow
def test_no_bars_and_no_warnings_of_other_libraries(tmp_path):
    """The check of the adapter loads a plain model, whose bar would have a state a tensor."""
    model, data, out = tmp_path / "model", tmp_path / "data.json", tmp_path / "out"
    save_tiny_model("olmoe", model)
    write_examples(data, 12)
    paths = ("--model_name_or_path", model, "--data_path", data, "--output_dir", out)
    log = log_of("train_accelerate_fsdp2.py", *OPTIONS.split(), *paths)
    assert "plain PEFT's" in " ".join(log.split())
    evaluation = ("megablocks_utils.evaluate", model, "--data_path", data, "--adapter", out)
    log += log_of("-m", *evaluation)
    for unwanted in ("\r", "it/s]", "Loading weights", "Warning"):
        assert unwanted not in log
