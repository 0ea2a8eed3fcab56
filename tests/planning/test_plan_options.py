"""The command line of a plan: whose word is whose, and one sentence for every slip."""

import dataclasses

import pytest
from transformers import TrainingArguments

from megablocks_utils.config import OPTIONS
from megablocks_utils.config.hints import find_slip
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.planning.plan_arguments import COMMAND
from megablocks_utils.planning.plan_options import parse_plan_options

PLAN = "m --gpu a100-80g"


def parse(line):
    return parse_plan_options(line.split())


def test_own_words_and_those_of_a_run():
    options = parse(
        "--gpus=16 m --gpu h100-80g --use_lora all --report_to tensorboard --shuffle --gpu_mem_gib "
        "79.5 --lora-r 4 --imbalance 2 --learning_rate=1e-4"
    )
    assert (options.model, options.world_sizes) == ("m", (16,))
    assert options.own.gpu == "h100-80g"
    assert (options.own.gpu_mem_gib, options.own.imbalance) == (79.5, 2.0)
    assert (options.config.adapter.use_lora, options.config.adapter.lora_r) == ("all", 4)
    assert " ".join(options.words) == (
        "--use_lora all --report_to tensorboard --shuffle --lora_r 4 --learning_rate 1e-4"
    )
    defaults = parse(PLAN)
    assert (defaults.world_sizes, defaults.own.entry_point) == ((8,), "fsdp2")
    assert (defaults.ep_size, defaults.expert_dp, defaults.words) == (None, None, ())


def test_the_model_may_be_named_as_a_run_names_it():
    assert parse("--model_name_or_path a/b --gpu a100-80g").model == "a/b"
    same = parse("a/b --model_name_or_path a/b --gpu a100-80g")
    assert (same.model, same.words) == ("a/b", ())


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8", (8,)),
        ("8..8", (8,)),
        ("8..64", (8, 16, 32, 64)),
        ("8..100", (8, 16, 32, 64)),
        ("6..25", (6, 12, 24)),
    ],
)
def test_numbers_of_gpus(text, sizes):
    assert parse(f"{PLAN} --gpus {text}").world_sizes == sizes


@pytest.mark.parametrize(
    ("line", "ep_size", "expert_dp", "has_ep"),
    [
        ("--ep_size 4", 4, None, True),
        ("--expert_degree 4", 4, None, True),
        ("--expert_dp replicate", None, "replicate", True),
        ("--use_megablocks_sharding True", None, None, True),
        ("--use_megablocks_sharding True --ep_size 2 --expert_dp shard", 2, "shard", True),
        ("--use_megablocks_sharding False", 1, None, False),
    ],
)
def test_layouts_that_are_asked_for(line, ep_size, expert_dp, has_ep):
    options = parse(f"{PLAN} {line} --seed 3")
    assert (options.ep_size, options.expert_dp) == (ep_size, expert_dp)
    assert options.config.parallel.use_megablocks_sharding == has_ep
    assert options.words == ("--seed", "3")  # each row adds its own


GPU_WANTED = "it must be a100-40g, a100-80g, h100-80g, h200-141g, b200-180g or l40s-48g"
GPUS_WANTED = "it must be a whole number of at least 1, or two of them as in 8..4096"
REFUSALS = {
    f"{PLAN} --gpus 8..1000001": "--gpus is 8..1000001, but it must be at most 1000000.",
    f"{PLAN} --gpus {10**20}": f"--gpus is {10**20}, but it must be at most 1000000.",
    f"{PLAN} --gpu_mem_gib 1e300": "--gpu_mem_gib is 1e300, but it must be at most 1000000.",
    f"{PLAN} --gpus_per_node 1_0": "--gpus_per_node is 1_0, but it must be a whole number of at "
    "least 1.",
    "m": f"--gpu is not given, but {GPU_WANTED}, or give --gpu_mem_gib.",
    "m --gpu a100": f"--gpu is a100, but {GPU_WANTED}.",
    "m --gpu": f"--gpu has no value, but {GPU_WANTED}.",
    "--gpu a100-80g": "MODEL is not given, but it must be a local folder or a Hub name.",
    f"{PLAN} other": "two models given: m and other; give one, and options as --name value.",
    f"{PLAN} --model_name_or_path n": "two models given: m and n; give one, and options as --name "
    "value.",
    f"{PLAN} --gpus 0": f"--gpus is 0, but {GPUS_WANTED}.",
    f"{PLAN} --gpus 16..8": f"--gpus is 16..8, but {GPUS_WANTED}.",
    f"{PLAN} --gpus eight": f"--gpus is eight, but {GPUS_WANTED}.",
    f"{PLAN} --gpus": f"--gpus has no value, but {GPUS_WANTED}.",
    "m --gpu_mem_gib 0": "--gpu_mem_gib is 0, but it must be a number above 0.",
    f"{PLAN} --imbalance 0.5": "--imbalance is 0.5, but it must be a number of at least 1.",
    f"{PLAN} --gpus_per_node 0": "--gpus_per_node is 0, but it must be a whole number of at least "
    "1.",
    f"{PLAN} --engine fake": "unknown option --engine; --help lists all options.",
    f"{PLAN} --gpu h100-80g": "--gpu is given twice, as a100-80g and as h100-80g; give it once.",
    f"{PLAN} --seed 1 --seed 2": "--seed is given twice, as 1 and as 2; give it once.",
    f"{PLAN} --json": "--json has no value, but it must be a file to write.",
    f"{PLAN} --json none/p.json": "--json is none/p.json, but none is no folder; it must be a file "
    "in a folder that exists.",
    f"{PLAN} --plot tests": "--plot is tests, but that is a folder; it must be a file in a folder "
    "that exists.",
    # the run's own parser speaks
    f"{PLAN} --use_lora some": "--use_lora is some, but it must be none, attn-only, mlp-only or "
    "all.",
    f"{PLAN} --use_megablocks_sharding False --ep_size 4": "--ep_size is 4, but it needs "
    "--use_megablocks_sharding True.",
    f"{PLAN} --entry_point fsdp1 --expert_dp shard": "--expert_dp is shard, but FSDP1 keeps copies "
    "of the experts: it must be replicate, or use train_accelerate_fsdp2.py.",
    # the nearest name of both sets
    f"{PLAN} --gpu_memgib 3": "unknown option --gpu_memgib; did you mean --gpu_mem_gib?",
    f"{PLAN} --use_lorra all": "unknown option --use_lorra; did you mean --use_lora?",
    f"{PLAN} --entry_point fsdp1 --max_seq_len 3": "unknown option --max_seq_len; did you mean "
    "--max_seq_length?",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line):
    with pytest.raises(ConfigurationError) as caught:
        parse(line)
    assert str(caught.value) == REFUSALS[line]


def test_help():
    for word in ("-h", "--help"):
        with pytest.raises(HelpRequested) as caught:
            parse(f"m {word}")
    text = str(caught.value)
    assert "--gpu {a100-40g|a100-80g|" in text and "--use_lora {" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_no_own_option_hides_one_of_a_run():
    assert len(set(COMMAND.names)) == len(COMMAND.names)


def test_options_come_from_a_file_too(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "gpu: h100-80g\ngpus: 8..16\nmodel_name_or_path: m\nshuffle: no\nseed: 3\nep_size: 2\n"
    )
    options = parse(f"--config {path} --seed 4")
    assert (options.model, options.own.gpu, options.world_sizes) == ("m", "h100-80g", (8, 16))
    assert (options.ep_size, options.config.parallel.use_megablocks_sharding) == (2, True)
    assert options.words == ("--seed", "4", "--shuffle", "False")


def test_fsdp1_takes_all_of_training_arguments():
    """None of them is taken for a slip of one of ours."""
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    ours = [name for option in OPTIONS for name in option.names]
    theirs = [name for name in names if name not in ours]
    assert len(theirs) > 80
    line = f"{PLAN} --entry_point fsdp1 --logging_strategy steps --dataloader_num_workers 1"
    options = parse(line)
    assert options.passed_on == ("--logging_strategy", "--dataloader_num_workers")
    assert " ".join(options.words) == "--logging_strategy steps --dataloader_num_workers 1"
    for name in theirs:
        if name not in ("bf16", "fp16"):  # refused by the parser: dtypes are --precision's
            assert f"--{name}" in parse(f"{PLAN} --entry_point fsdp1 --{name} 1").passed_on
            assert find_slip(name, COMMAND.names, 0.88) is None
    for line in (f"{PLAN} --entry_point fsdp1 --micro_batch_size 1", f"{PLAN} --gpuss 1"):
        with pytest.raises(ConfigurationError, match="did you mean"):
            parse(line)


def test_the_rank_is_that_of_the_adapter_that_is_resumed(tmp_path):
    line = f"{PLAN} --use_lora all --resume_adapter {tmp_path}"
    with pytest.raises(ConfigurationError, match="its rank is not known: .* give --lora_r[.]"):
        parse(line)
    assert parse(f"{line} --lora_r 4").config.adapter.lora_r == 4
    path = tmp_path / "adapter_config.json"
    path.write_text('{"r": 32}')
    assert parse(line).config.adapter.lora_r == 32
    assert "--lora_r" not in parse(line).words
    with pytest.raises(ConfigurationError, match=f"--lora_r is 4, but the adapter {path.parent}"):
        parse(f"{line} --lora_r 4")
    for text in ("{", "[]", '{"r": 0}', '{"r": true}', '{"r": 16.0}', "{}"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"{path} (cannot be read|has r)"):
            parse(line)
