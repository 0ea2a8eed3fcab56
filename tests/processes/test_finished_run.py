"""A finished run is known by its options, and only where one command starts and requeues it."""

import json
from dataclasses import asdict

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.processes.finished_run import is_finished_run

AUTO = "--resume_from_checkpoint auto"


@pytest.mark.parametrize(
    ("words", "is_finished"),
    [
        (AUTO, True),
        (f"{AUTO} --logging_steps 5 --time_limit 2h --report_to tensorboard", True),
        (f"{AUTO} --max_steps 9", False),
        (f"{AUTO} --learning_rate 1e-3", False),
        (f"{AUTO} --overwrite_output_dir True", False),
        ("--resume_from_checkpoint True", False),
        ("", False),
    ],
)
def test_which_run_is_finished(words, is_finished, tmp_path):
    folder = f"--output_dir {tmp_path} "
    config = parse_args((folder + words).split(), entry_point="fsdp2")
    assert not is_finished_run(config)
    record = asdict(parse_args(folder.split(), entry_point="fsdp2"))
    (tmp_path / "run.json").write_text(json.dumps({"options": record}))
    assert is_finished_run(config) == is_finished


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 3}', "[" * 100_000, "\0"])
def test_a_damaged_record_is_no_finished_run(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    line = f"--output_dir {tmp_path} {AUTO}"
    assert not is_finished_run(parse_args(line.split(), entry_point="fsdp2"))
