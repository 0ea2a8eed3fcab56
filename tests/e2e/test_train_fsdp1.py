"""The FSDP1 script as it is called: `accelerate launch`, with the contract's flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.faults.ranks import ScriptRun
from tests.support.ports import free_port
from tests.support.tiny_models import edit_config, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "--num_processes 2 --config_file accelerate.yaml train_fsdp1.py"
FLAGS = (
    "--accelerator_config accelerator_config.json --torch_dtype bfloat16 --num_train_epochs 1 "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
    "--gradient_accumulation_steps 4 --gradient_checkpointing True --evaluation_strategy no "
    "--save_strategy no --learning_rate 5e-5 --lr_scheduler_type linear --logging_steps 1 "
    "--use_megablocks_sharding True"
)


@pytest.fixture
def folder(tmp_path):
    """A tiny model, and two global batches of 8 examples, the last one smaller."""
    save_tiny_model("mixtral", tmp_path / "model")
    edit_config(tmp_path / "model", architectures=None)
    examples = [{"input_ids": [5 + i % 90, 6, 7, 8], "labels": [-100, 6, 7, 8]} for i in range(10)]
    (tmp_path / "data.json").write_text(json.dumps(examples))
    return tmp_path


def _paths(folder):
    return [
        *("--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "data.json")),
        *("--output_dir", str(folder / "out")),
    ]


def test_two_steps_as_the_contract_writes_them(folder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port"]
    command += [str(free_port()), *LAUNCH.split(), *FLAGS.split(), *_paths(folder)]
    command += ["--expert_load_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "info"}
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert answer.returncode == 0, answer.stderr
    assert "Warning" not in answer.stderr + answer.stdout
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["tokens"] for step in steps] == [24, 6]
    assert [step["epoch"] for step in steps] == pytest.approx([1 / 2, 1])
    assert steps[0]["learning_rate"] == 5e-5
    assert "moe_load_max_over_mean" not in steps[0]
    loads = [json.loads(x) for x in (folder / "out" / "expert_load.jsonl").read_text().splitlines()]
    assert {load["step"] for load in loads} == {2}
    assert steps[1]["moe_load_max_over_mean"] == max(load["max_over_mean"] for load in loads)
    assert (folder / "out" / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert "(--imbalance)" in " ".join(answer.stderr.split())
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    before = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    before.save_pretrained(folder / "stock")
    for name in ("config.json", "generation_config.json"):
        saved, stock = (json.loads((folder / at / name).read_text()) for at in ("out", "stock"))
        assert saved == stock
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) // 2
    assert json.loads((folder / "out" / "run.json").read_text())["mesh"] == {"dp": 1, "ep": 2}


def test_a_flag_of_the_trainer_that_cannot_work_is_one_sentence_and_exit_code_two(folder):
    argv = [*FLAGS.split(), "--deepspeed", "zero3.json", *_paths(folder)]
    with ScriptRun("fsdp1", argv, folder / "logs", world_size=2) as run:
        assert run.wait(60) == [2, 2]
        said = [line for line in run.output().splitlines() if line]
    assert said == [
        "--deepspeed is zero3.json, but FSDP is set up from accelerate.yaml and the options of "
        "this script."
    ]
    assert not (folder / "out").exists()
