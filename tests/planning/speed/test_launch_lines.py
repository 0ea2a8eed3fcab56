"""The command of a row, read back by the scripts' own parser, asks for exactly that row."""

import re
import shlex
from dataclasses import replace

import pytest

from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.planning.speed.launch_lines import break_line, build_launch
from tests.planning.cases import build_scenario

WORDS = ["--output_dir", "my --results", "--report_to", "tensorboard", "--learning_rate=1e-4"]


def launch(layout, entry_point="fsdp2", gpus=8, words=()):
    return build_launch(
        "a/b", layout, entry_point=entry_point, gpus=gpus, gpus_per_node=8, words=list(words)
    )


def test_one_node():
    assert launch(ParallelLayout(4, "shard")) == (
        "torchrun --standalone --nproc_per_node=8 train_accelerate_fsdp2.py --model_name_or_path "
        "a/b --use_megablocks_sharding True --ep_size 4 --expert_dp shard"
    )
    assert launch(ParallelLayout(1, "shard"), gpus=2) == (
        "torchrun --standalone --nproc_per_node=2 train_accelerate_fsdp2.py --model_name_or_path "
        "a/b --use_megablocks_sharding False"
    )
    assert launch(ParallelLayout(8, "replicate"), "fsdp1") == (
        "accelerate launch --num_processes 8 --config_file accelerate.yaml train_fsdp1.py "
        "--model_name_or_path a/b --use_megablocks_sharding True --ep_size 8"
    )


def test_several_nodes():
    assert launch(ParallelLayout(8, "shard"), gpus=32).startswith(
        "torchrun --nnodes=4 --rdzv_backend c10d --rdzv_endpoint $HEAD_NODE:29500 "
        "--nproc_per_node=8 train_accelerate_fsdp2.py "
    )
    assert launch(ParallelLayout(8, "replicate"), "fsdp1", gpus=32).startswith(
        "accelerate launch --num_processes 32 --num_machines 4 --machine_rank $NODE_RANK "
        "--main_process_ip $HEAD_NODE --main_process_port 29500 --config_file accelerate.yaml "
        "train_fsdp1.py "
    )


@pytest.mark.parametrize("entry_point", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize("width", [40, 100])
def test_every_command_asks_for_its_row(entry_point, width):
    scenario = build_scenario(entry_point=entry_point)
    for layout in scenario.legal_layouts():
        command = launch(layout, entry_point, words=WORDS)
        shown = break_line(command, width)
        assert shlex.split(shown.replace("\\\n", "")) == shlex.split(command)
        script = re.split(r"train_\w+\.py ", command)[1]
        parse = {"fsdp2": parse_args, "fsdp1": parse_known_args}[entry_point]
        config = parse(shlex.split(script), entry_point=entry_point)
        config = config[0] if entry_point == "fsdp1" else config
        assert replace(scenario, config=config).own_layout() == layout
        assert (config.output_dir, config.optim.learning_rate) == ("my --results", 1e-4)


def test_lines_stay_in_the_width_and_break_before_options():
    lines = break_line(launch(ParallelLayout(4, "shard"), words=WORDS), 60).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 60
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert all(line.startswith("  --") for line in lines[1:])
