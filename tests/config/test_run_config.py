"""The door: both published commands field by field, every refusal word for word."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megablocks_utils.config import (
    OPTION_NAMES,
    OPTIONS,
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    ResolvedPrecision,
    RunConfig,
    SavingConfig,
    check_leftovers,
    check_world,
    parse_args,
    parse_known_args,
    resolve_precision,
)
from megablocks_utils.config.entry_points import SCRIPTS
from megablocks_utils.config.evaluation import EvaluationConfig
from megablocks_utils.config.help_text import format_help, format_options_table
from megablocks_utils.config.parallel import check_heads, count_data_ranks
from megablocks_utils.config.quantization import NO_DENSE_NF4
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
SHARDING = "--use_megablocks_sharding True"
EVALUATED = "--eval_strategy steps --eval_data_path x.json"
PUBLISHED_FSDP2 = (
    "--gradient_accumulation_steps 16 --use_megablocks_sharding True --debug True "
    "--learning_rate 5e-5"
)
PUBLISHED_FSDP1 = (
    "--accelerator_config accelerator_config.json --data_path data.json --torch_dtype bfloat16 "
    "--output_dir ./results --num_train_epochs 1 --per_device_train_batch_size 1 "
    "--per_device_eval_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing True "
    "--evaluation_strategy no --save_strategy no --learning_rate 5e-5 --lr_scheduler_type linear "
    "--logging_steps 1 --use_megablocks_sharding True"
)


def parse(line: str, entry_point: str = "fsdp2") -> RunConfig:
    return parse_args(line.split(), entry_point=entry_point)


def words_of(leftovers) -> list[str]:
    return [word for given in leftovers for word in given.words()]


def refusal(line: str, entry_point: str = "fsdp2") -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(line, entry_point)
    return str(caught.value)


def test_published_fsdp2_command():
    assert parse(PUBLISHED_FSDP2) == RunConfig(
        entry_point="fsdp2",
        model=ModelConfig("mistralai/Mixtral-8x7B-Instruct-v0.1", truncate_model_for_debug=False),
        data=DataConfig(("data/alpaca_sample.json",), max_seq_length=4096, shuffle=True),
        parallel=ParallelConfig(True, ep_size=None, expert_dp="shard", kernel="auto"),
        adapter=AdapterConfig("none", lora_r=16, lora_alpha=16),
        precision=PrecisionConfig(None, dtype=None, optim_dtype=None),
        optim=OptimConfig(
            learning_rate=5e-5,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            num_train_epochs=3.0,
            max_steps=-1,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=16,
            sync_each_batch=True,
            freeze_router=False,
        ),
        saving=SavingConfig("no", 500, save_total_limit=None, async_save=False),
        output_dir="./results",
        overwrite_output_dir=False,
        gradient_checkpointing="full",
        router_aux_loss_coef=None,
        seed=42,
        logging_steps=1,
        report_to=(),
        debug=True,
    )


def test_published_fsdp1_command():
    config, leftovers = parse_known_args(PUBLISHED_FSDP1.split(), entry_point="fsdp1")
    assert config == RunConfig(
        entry_point="fsdp1",
        model=ModelConfig("mistralai/Mixtral-8x7B-Instruct-v0.1", truncate_model_for_debug=False),
        data=DataConfig(("data.json",), max_seq_length=4096, shuffle=True),
        parallel=ParallelConfig(True, ep_size=None, expert_dp="replicate", kernel="auto"),
        adapter=AdapterConfig("none", lora_r=16, lora_alpha=16),
        precision=PrecisionConfig(None, dtype="bfloat16", optim_dtype=None),
        optim=OptimConfig(
            learning_rate=5e-5,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            num_train_epochs=1.0,
            max_steps=-1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=16,
            sync_each_batch=True,
            freeze_router=False,
        ),
        evaluation=EvaluationConfig(per_device_eval_batch_size=1),
        saving=SavingConfig("no", 500, save_total_limit=None, async_save=False),
        output_dir="./results",
        overwrite_output_dir=False,
        gradient_checkpointing="full",
        router_aux_loss_coef=None,
        seed=42,
        logging_steps=1,
        report_to=(),
        debug=False,
    )
    assert words_of(leftovers) == ["--accelerator_config", "accelerator_config.json"]


@pytest.mark.parametrize(
    ("line", "same"),
    [
        (f"{SHARDING} --expert_degree 4", f"{SHARDING} --ep_size=4"),
        ("--torch_dtype bfloat16", "--dtype=bfloat16"),
        ("--evaluation_strategy no", "--eval_strategy=no"),
        ("--activation_checkpointing False", "--gradient_checkpointing false"),
        ("--max-seq-length 12", "--max_seq_length=12"),
        ("--debug", "--debug TRUE"),
        ("--gradient_checkpointing", ""),
        ("--use_scattermoe false", ""),
        (f"{SHARDING} --use_scattermoe", f"{SHARDING} --kernel scattermoe"),
        (f"{SHARDING} --use_scattermoe --kernel scattermoe", f"{SHARDING} --kernel scattermoe"),
        ("--report_to none", ""),
        ("--optim adamw_torch_fused", "--optim adamw"),
        ("--report_to none none", ""),
        ("--learning_rate .5e-3", "--learning_rate 0.0005"),
    ],
)
def test_two_ways_to_say_the_same(line, same):
    assert parse(line) == parse(same)


def test_values_that_are_rewritten():
    config = parse(
        "--gradient_checkpointing selective --report_to tensorboard --use_lora attn-only "
        "--max_steps -1 --warmup_steps 0.1 --shuffle FALSE --router_aux_loss_coef 0"
    )
    assert config.gradient_checkpointing == "selective"
    assert config.report_to == ("tensorboard",)
    assert config.optim.sync_each_batch is False
    assert (config.optim.max_steps, config.optim.warmup_steps) == (-1, 0.1)
    assert config.data.shuffle is False
    assert config.router_aux_loss_coef == 0.0
    assert parse("--gradient_checkpointing FALSE").gradient_checkpointing == "none"
    assert parse("--use_lora attn-only --sync_each_batch True").optim.sync_each_batch is True
    assert parse("--sync_each_batch false").optim.sync_each_batch is False


SAVES = {
    "--save_steps 3": [],  # taken, as Hugging Face takes it, but nothing is saved
    "--save_strategy steps": [10],  # the default is 500, and the last step counts
    "--save_strategy steps --save_steps 3": [3, 6, 9, 10],
    "--save_strategy steps --save_steps 5": [5, 10],
    "--save_strategy steps --save_steps 0.25": [3, 6, 9, 10],  # ceil(2.5)
    "--save_strategy epoch": [4, 8, 10],
}


@pytest.mark.parametrize("line", SAVES)
def test_when_checkpoints_are_due(line):
    saving = parse(line).saving
    due = [n for n in range(1, 11) if saving.is_due(n, num_steps=10, steps_per_epoch=4)]
    assert due == SAVES[line]


REFUSALS = {
    "--tp_size 2": "--tp_size is 2, but it needs --use_megablocks_sharding True (also --ep_size "
    "1), so that ranks with the same rows share the work of the experts.",
    f"{SHARDING} --tp_size 2 --compile True": "--tp_size is 2, but torch compiles no layer "
    "whose weights are split: it must be 1, or --compile False.",
    "--dp_replicate_size 2 --cpu_offload params": "--dp_replicate_size is 2, but with "
    "--cpu_offload params it must be 1: FSDP leaves copies of the experts on the devices.",
    "--learning_rat 1": "unknown option --learning_rat; did you mean --learning_rate?",
    "--learning_rat=1": "unknown option --learning_rat; did you mean --learning_rate?",
    "--expert_degre 1": "unknown option --expert_degre; did you mean --expert_degree?",
    "data.json": "data.json is not an option; write options as --name value.",
    "--debug True 5": "--debug is True and 5, but it takes one value.",
    "--seed 1 2 3": "--seed is 1, 2 and 3, but it takes one value.",
    "--seed 1 --seed=2": "--seed is given twice, as 1 and as 2; give it once.",
    "--debug --debug": "--debug is given twice, as no value and as no value; give it once.",
    "--report_to none --report_to tensorboard": "--report_to is given twice, as none and as "
    "tensorboard; give it once.",
    f"{SHARDING} --ep_size 2 --expert_degree 4": "--ep_size 2 and --expert_degree 4 are the same "
    "option given twice; leave one of the two out.",
    "--max-steps 1 --max_steps 2": "--max_steps is given twice, as 1 and as 2; give it once.",
    "--optim sgd": "--optim is sgd, but it must be adamw, adamw_torch_fused, adamw_torch or muon.",
    "--optim adamw_8bit": "--optim is adamw_8bit, but torchao's 8-bit AdamW fails on sharded "
    "bfloat16 weights and cannot be resumed on every number of processes (--optim_dtype bfloat16 "
    "halves float32 states): it must be adamw, adamw_torch_fused, adamw_torch or muon.",
    "--use_dora True --use_lora all": "--use_dora is True, but DoRA divides by norms of whole "
    "merged weights in every forward pass, which lie on several ranks: it must be False "
    "(plain LoRA).",
    "--optim muon --cpu_offload params": "--optim is muon, but with --cpu_offload params it must "
    "be adamw: whole matrices are put together on the devices.",
    "--seed 1_000": "--seed is 1_000, but it must be a whole number from 0 to 4294967295.",
    "--seed ٣": "--seed is ٣, but it must be a whole number from 0 to 4294967295.",
    "--learning_rate 1_0e-5": "--learning_rate is 1_0e-5, but it must be a number of at least 0.",
    "--learning_rate 1e999": "--learning_rate is 1e999, but it must be at most 3e+38.",
    "--learning_rate 1e-400": "--learning_rate is 1e-400, but it must be a number of at least 0.",
    f"--max_steps {10**9 + 1}": f"--max_steps is {10**9 + 1}, but it must be at most 1000000000.",
    f"--max_steps {10**60}": f"--max_steps is 1{39 * '0'}..., but it must be at most 1000000000.",
    f"--max_steps -{10**20}": f"--max_steps is -{10**20}, but it must be a whole number of at "
    "least -1.",
    "--num_train_epochs 1e300": "--num_train_epochs is 1e300, but it must be at most 1000000.",
    "--lora_r 65537": "--lora_r is 65537, but it must be at most 65536.",
    "--time_limit 90": "--time_limit is 90, but it must be a time of at most a year, such as "
    "3h50m, 90m, 45s, 03:50:00 or 1-03:50:00.",
    "--data_path": "--data_path has no value, but it must be a name or path.",
    "--data_path=": "--data_path is empty, but it must be a name or path.",
    "--seed --debug True": "--seed has no value, but it must be a whole number from 0 to "
    "4294967295.",
    "--seed 4294967296": "--seed is 4294967296, but it must be a whole number from 0 to "
    "4294967295.",
    "--debug yes": "--debug is yes, but it must be True or False.",
    "--lora_r 0": "--lora_r is 0, but it must be a whole number of at least 1.",
    "--lora_r 1.5": "--lora_r is 1.5, but it must be a whole number of at least 1.",
    "--lora_alpha 0": "--lora_alpha is 0, but it must be a whole number of at least 1.",
    "--learning_rate -1": "--learning_rate is -1, but it must be a number of at least 0.",
    "--learning_rate nan": "--learning_rate is nan, but it must be a number of at least 0.",
    "--learning_rate inf": "--learning_rate is inf, but it must be a number of at least 0.",
    "--learning_rate fast": "--learning_rate is fast, but it must be a number of at least 0.",
    "--max_grad_norm -1": "--max_grad_norm is -1, but it must be a number of at least 0.",
    "--weight_decay -1": "--weight_decay is -1, but it must be a number of at least 0.",
    "--num_train_epochs 0": "--num_train_epochs is 0, but it must be a number above 0.",
    "--max_steps 0": "--max_steps is 0, but it must be -1 (not set) or at least 1.",
    "--max_steps -2": "--max_steps is -2, but it must be a whole number of at least -1.",
    "--warmup_steps 1.5": "--warmup_steps is 1.5, but it must be a whole number, or below 1 a "
    "share.",
    "--max_seq_length 1": "--max_seq_length is 1, but it must be a whole number of at least 2.",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size is 0, but it must be a whole "
    "number of at least 1.",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps is 0, but it must be a whole "
    "number of at least 1.",
    "--logging_steps 0": "--logging_steps is 0, but it must be a whole number of at least 1.",
    "--router_aux_loss_coef -1": "--router_aux_loss_coef is -1, but it must be a number of at "
    "least 0.",
    "--gradient_checkpointing some": "--gradient_checkpointing is some, but it must be True, False "
    "or selective.",
    "--kernel fast": "--kernel is fast, but it must be auto, eager, grouped_mm, triton, "
    "scattermoe or megablocks.",
    "--precision fp16": "--precision is fp16, but it must be fp32, mixed, bf16_sr or bf16.",
    "--dtype float16": "--dtype is float16, but it must be float32 or bfloat16.",
    "--torch_dtype auto": "--torch_dtype is auto, but it must be float32 or bfloat16.",
    "--report_to comet_ml": "--report_to is comet_ml, but it must be none, tensorboard, wandb, "
    "mlflow or trackio.",
    "--report_to none tensorboard": "--report_to is none, tensorboard, but none excludes all "
    "others.",
    "--eval_strategy steps": "--eval_strategy is steps, but no examples are held out: give "
    "--eval_data_path or --eval_fraction.",
    "--eval_fraction 0.1": "--eval_fraction is 0.1, but --eval_strategy is no: it must be steps or "
    "epoch.",
    "--eval_strategy epoch --eval_fraction 0.1 --eval_dataset_split test": "--eval_dataset_split "
    "is test, but there is no --eval_data_path that it could be of.",
    "--predict_samples 2": "--predict_samples is 2, but --eval_strategy is no: it must be steps or "
    "epoch.",
    "--eval_strategy epoch --eval_fraction 0.1 --eval_data_path x.json": "--eval_data_path is "
    "x.json and --eval_fraction is 0.1, but the held-out examples come from one of them: leave the "
    "other out.",
    "--eval_strategy steps --eval_fraction 1": "--eval_fraction is 1, but it must be below 1: no "
    "examples would be left to train on.",
    "--eval_strategy epoch --eval_fraction 0.1 --eval_steps 5": "--eval_steps is 5, but "
    "--eval_strategy is epoch: it must be steps.",
    f"{EVALUATED} --eval_steps 2.5": "--eval_steps is 2.5, but it must be a whole number, or below "
    "1 a share.",
    f"{EVALUATED} --load_best_model_at_end True": "--load_best_model_at_end is True, but "
    "--save_strategy is no and --eval_strategy is steps: they must be the same.",
    f"{EVALUATED} --load_best_model_at_end True --save_strategy steps --eval_steps 4 --save_steps "
    "6": "--load_best_model_at_end is True, but --save_steps is 6: it must be a multiple of "
    "--eval_steps, 4, so that every checkpoint has an eval_loss.",
    "--use_lora experts": "--use_lora is experts, but it must be none, attn-only, mlp-only or all.",
    "--verify_adapter maybe": "--verify_adapter is maybe, but it must be auto, True or False.",
    "--resume_adapter out": "--use_lora is none, but --resume_adapter needs it to say what the "
    "adapter is on: attn-only, mlp-only or all.",
    f"{SHARDING} --use_scattermoe --kernel eager": "--use_scattermoe is True, but --kernel is "
    "eager; leave one of the two out.",
    "--use_scattermoe": "--use_scattermoe is True, but it needs --use_megablocks_sharding True.",
    f"{SHARDING} --use_scattermoe true --use_lora all": "--use_lora is all, but scattermoe runs "
    "experts without adapters; --kernel auto, eager, grouped_mm or triton runs them with adapters.",
    f"{SHARDING} --kernel megablocks --use_lora mlp-only": "--use_lora is mlp-only, but megablocks "
    "runs experts without adapters; --kernel auto, eager, grouped_mm or triton runs them with "
    "adapters.",
    "--use_lora all --lora_target attention": "--use_lora is all, but --lora_target is attention: "
    "leave one of the two out.",
    "--lora_target experts,attention --lora_dropout 0.1": "--lora_dropout is 0.1, but "
    "--lora_target experts,attention also puts adapters on experts, where nothing can be dropped "
    "(all rows or whole weights at once): it must be 0, or --lora_target without them.",
    "--dense_quantization nf4": f"--dense_quantization is nf4, but {NO_DENSE_NF4}: it must be "
    "none.",
    "--lora_target router --freeze_router True": "--freeze_router is True, but --lora_target "
    "router puts adapters on routers: it must be False.",
    "--save_strategy often": "--save_strategy is often, but it must be no, steps or epoch.",
    "--save_steps 0": "--save_steps is 0, but it must be a number above 0.",
    "--save_steps 2.5": "--save_steps is 2.5, but it must be a whole number, or below 1 a share.",
    "--save_total_limit 0": "--save_total_limit is 0, but it must be a whole number of at least 1.",
    "--resume_from_checkpoint": "--resume_from_checkpoint has no value, but it must be a name or "
    "path.",
    "--ep_size 2": "--ep_size is 2, but it needs --use_megablocks_sharding True.",
    "--expert_dp shard": "--expert_dp is shard, but it needs --use_megablocks_sharding True.",
    "--kernel eager": "--kernel is eager, but it needs --use_megablocks_sharding True.",
    "--token_dispatch tokens": (
        "--token_dispatch is tokens, but it needs --use_megablocks_sharding True."
    ),
    f"{SHARDING} --ep_size 0": "--ep_size is 0, but it must be a whole number of at least 1.",
    "--precision fp32 --dtype bfloat16": "--dtype is bfloat16, but --precision fp32 means float32; "
    "leave one of the two out.",
    "--precision bf16_sr --dtype float32": "--dtype is float32, but --precision bf16_sr means "
    "bfloat16; leave one of the two out.",
    "--precision mixed --dtype bfloat16": "--dtype is bfloat16, but --precision mixed stores and "
    "computes in different dtypes; leave --dtype out.",
}


@pytest.mark.parametrize(("line", "sentence"), REFUSALS.items())
def test_refusals(line, sentence):
    assert refusal(line) == sentence


@pytest.mark.parametrize("flag", ["--bf16 True", "--fp16 True", "--bf16", "--fp16=true"])
def test_fsdp1_refuses_a_second_rule_for_dtypes(flag):
    with pytest.raises(ConfigurationError) as caught:
        parse_known_args([*flag.split(), "--debug", "True"], entry_point="fsdp1")
    name = re.match("--[a-z0-9]+", flag).group()
    assert str(caught.value) == (
        f"{name} is given, but dtypes come from --precision; use --precision fp32, mixed, bf16_sr "
        "or bf16."
    )


def test_what_cannot_be_offloaded():
    assert refusal("--cpu_offload params", "fsdp1") == (
        "--cpu_offload is params, but FSDP1 leaves the experts, most of the weights, on the "
        "devices: it must be none or optimizer, or use train_accelerate_fsdp2.py."
    )
    words = f"{SHARDING} --cpu_offload params --expert_dp replicate --ep_size"
    with pytest.raises(ConfigurationError) as caught:
        check_world(parse(f"{words} 2"), 4)
    assert caught.value.as_options().startswith(
        "--cpu_offload is params, but with --expert_dp replicate and --ep_size 2 on 4 processes"
    )
    check_world(parse(f"{words} 4"), 4)  # there is one copy of each expert


def test_fsdp1_specifics():
    assert refusal("--tp_size 2", "fsdp1").startswith("--tp_size is 2, but FSDP1 shards no tensors")
    assert refusal("--dp_replicate_size 2", "fsdp1").startswith(
        "--dp_replicate_size is 2, but train_fsdp1.py shards over all processes"
    )
    assert refusal(f"{SHARDING} --expert_dp shard", "fsdp1") == (
        "--expert_dp is shard, but FSDP1 keeps copies of the experts: it must be replicate, or "
        "use train_accelerate_fsdp2.py."
    )
    assert refusal("--compile True --gradient_accumulation_steps 2", "fsdp1").endswith(
        "--gradient_accumulation_steps is 2 and must be 1, or use train_accelerate_fsdp2.py."
    )
    line = "--bf16 False --label_names a b --adam_beta1=0.8 --eval_delay=1 --use_cpu"
    _, leftovers = parse_known_args(line.split(), entry_point="fsdp1")
    assert words_of(leftovers) == [
        *("--bf16", "False", "--label_names", "a", "b", "--adam_beta1", "0.8"),
        *("--eval_delay", "1", "--use_cpu"),
    ]
    check_leftovers(leftovers, {"bf16", "label_names", "adam_beta1", "eval_delay", "use_cpu"})
    with pytest.raises(ConfigurationError) as caught:
        _, leftovers = parse_known_args(["--learning_rat", "1"], entry_point="fsdp1")
        check_leftovers(leftovers, {"label_names"})
    assert str(caught.value) == "unknown option --learning_rat; did you mean --learning_rate?"
    with pytest.raises(ConfigurationError) as caught:
        _, leftovers = parse_known_args(["--label_name=x"], entry_point="fsdp1")
        check_leftovers(leftovers, {"label_names"})
    assert str(caught.value) == "unknown option --label_name; did you mean --label_names?"


F32, B16 = "float32", "bfloat16"
PRECISIONS = [
    ("", "cpu", ("fp32", F32, F32, F32, F32, False)),
    ("", "cuda", ("bf16_sr", B16, B16, B16, B16, True)),
    ("--use_lora attn-only", "cpu", ("fp32", F32, F32, F32, F32, False)),
    ("--use_lora attn-only", "cuda", ("mixed", B16, B16, F32, F32, False)),
    ("--precision fp32", "cuda", ("fp32", F32, F32, F32, F32, False)),
    ("--precision mixed", "cpu", ("mixed", F32, B16, F32, F32, False)),
    ("--precision bf16_sr", "cpu", ("bf16_sr", B16, B16, B16, B16, True)),
    ("--precision bf16", "cpu", ("bf16", B16, B16, B16, B16, False)),
    ("--precision mixed --use_lora attn-only", "cpu", ("mixed", B16, B16, F32, F32, False)),
    ("--precision bf16_sr --use_lora attn-only", "cpu", ("bf16_sr", B16, B16, B16, B16, True)),
    ("--precision bf16 --use_lora attn-only", "cuda", ("bf16", B16, B16, B16, B16, False)),
    ("--dtype float32", "cuda", ("fp32", F32, F32, F32, F32, False)),
    ("--dtype bfloat16", "cpu", ("bf16", B16, B16, B16, B16, False)),
    ("--precision bf16_sr --dtype bfloat16", "cpu", ("bf16_sr", B16, B16, B16, B16, True)),
    ("--precision bf16 --optim_dtype float32", "cpu", ("bf16", B16, B16, F32, B16, False)),
    ("--optim_dtype bfloat16", "cpu", ("fp32", F32, F32, B16, F32, False)),
]


@pytest.mark.parametrize(("line", "device_type", "wanted"), PRECISIONS)
def test_precision(line, device_type, wanted):
    assert resolve_precision(parse(line), device_type) == ResolvedPrecision(*wanted)


WORLDS = [
    ("--ep_size 3", 4, None, "--ep_size is 3, but it must divide the 4 processes of this run; "
     "1, 2 and 4 would work."),
    ("--ep_size 8", 4, 2, "--ep_size is 8, but it must divide the 4 processes of this run; "
     "1 and 2 would work."),
    ("--ep_size 2", 1, None, "--ep_size is 2, but it must divide the 1 process of this run; "
     "1 would work."),
    ("--ep_size 6", 6, 8, "--ep_size is 6, but it must divide the 8 experts of this model; "
     "1 and 2 would work."),
    ("", 3, 8, "--ep_size is 3 (the number of processes), but it must divide the 8 experts of this "
     "model; 1 would work."),
    ("--dp_replicate_size 3", 4, None, "--dp_replicate_size is 3, but it must divide the 4 "
     "processes of this run; 1, 2 and 4 would work."),
    ("--dp_replicate_size 2 --ep_size 4", 4, None, "--ep_size is 4, but it must divide the 2 "
     "processes of a group; 1 and 2 would work."),
]  # fmt: skip


@pytest.mark.parametrize(("line", "world_size", "num_experts", "sentence"), WORLDS)
def test_world_refusals(line, world_size, num_experts, sentence):
    config = parse(f"{SHARDING} {line}")
    with pytest.raises(ConfigurationError) as caught:
        check_world(config, world_size, num_experts)
    assert caught.value.as_options(OPTION_NAMES) == sentence
    assert str(caught.value) == sentence.removeprefix("--")


def test_data_ranks_are_one_of_each_group():
    assert count_data_ranks(16, 2, 4, 2) == 2
    sentence = (
        r"tp_size is 2 and sp_size is 4, but their product must divide the 4 processes of a group; "
        r"tp_size 2 with sp_size 2 would work\."
    )
    with pytest.raises(ConfigurationError, match=sentence):
        count_data_ranks(8, 2, 4, 2)
    check_heads([8, 32], sp_size=4, tp_size=2)
    sentence = (
        "divide the 4 heads of its attention that a rank has with tp_size 2; 1, 2 and 4 would"
    )
    with pytest.raises(ConfigurationError, match=sentence):
        check_heads([8, 32], sp_size=8, tp_size=2)


def test_worlds_that_fit():
    check_world(parse(f"{SHARDING} --ep_size 2"), 4, 8)
    check_world(parse(SHARDING), 4, 8)
    check_world(parse(SHARDING), 3)
    check_world(parse(""), 3, 8)
    check_world(parse("--dp_replicate_size 2"), 4)
    check_world(parse(f"{SHARDING} --dp_replicate_size 2"), 4, 2)  # ep 2, and not 4


def test_help_lists_every_option():
    for entry_point in ("fsdp1", "fsdp2"):
        for asking in ("--help", "-h"):
            with pytest.raises(HelpRequested) as caught:
                parse_args(["--debug", "True", asking], entry_point=entry_point)
            assert str(caught.value) == format_help(SCRIPTS[entry_point])
    text = format_help(SCRIPTS["fsdp1"])
    listed = re.findall(r"^  (--\w+(?:, --\w+)*) ", text, flags=re.MULTILINE)
    wanted = [", ".join(f"--{name}" for name in option.names) for option in OPTIONS]
    assert listed == [*wanted, "--config"]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "rank_and_alpha"),
    [
        ("", (16, 16)),
        ("--lora_r 8", (8, 16)),
        ("--resume_adapter out", (None, None)),  # the adapter's own
        ("--resume_adapter out --lora_alpha 4", (None, 4)),  # which must then be the adapter's
    ],
)
def test_rank_and_alpha(words, rank_and_alpha):
    adapter = parse(f"--use_lora all {words}").adapter
    assert (adapter.lora_r, adapter.lora_alpha) == rank_and_alpha


def test_parts_by_name_are_the_words_of_use_lora():
    """So that all that knows the words knows the parts; a configuration comes back from them."""
    adapter = parse("--lora_target attention,shared,experts").adapter
    assert (adapter.targets, adapter.expert_mode) == ("all", "lora")
    config = parse("--lora_target lm_head,router")
    assert config.adapter.targets == "router,lm_head"
    assert not config.optim.freeze_router
    assert AdapterConfig.of_targets("router,lm_head").parts == config.adapter.parts


@pytest.mark.parametrize(
    ("use_lora", "attention", "experts", "mode"),
    [
        ("none", False, False, "full"),
        ("attn-only", True, False, "frozen"),
        ("mlp-only", False, True, "lora"),
        ("all", True, True, "lora"),
    ],
)
def test_what_gets_adapters(use_lora, attention, experts, mode):
    adapter = AdapterConfig(use_lora)
    assert ("attention" in adapter.parts, adapter.trains_experts) == (attention, experts)
    assert adapter.expert_mode == mode


@pytest.mark.parametrize(
    "line",
    [
        *(f"{SHARDING} --kernel {kernel}" for kernel in ("triton", "scattermoe", "megablocks")),
        f"{SHARDING} --use_lora attn-only --kernel scattermoe",  # the experts have no adapters
        "--use_lora mlp-only --kernel triton",  # adapted experts are ours also without sharding
    ],
)
def test_kernels_that_can_be_named(line):
    assert parse(line).parallel.kernel == line.split()[-1]


def test_contract_options_are_all_there():
    names = set(SCRIPTS["fsdp2"].names)
    contract = """model_name_or_path data_path output_dir overwrite_output_dir
        use_megablocks_sharding ep_size expert_degree expert_dp kernel use_scattermoe use_lora
        lora_r lora_alpha precision dtype torch_dtype optim_dtype max_seq_length
        per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps
        learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm seed logging_steps
        save_strategy save_steps save_total_limit async_save resume_from_checkpoint report_to
        shuffle gradient_checkpointing router_aux_loss_coef debug truncate_model_for_debug
        eval_strategy evaluation_strategy eval_steps eval_data_path eval_fraction
        per_device_eval_batch_size load_best_model_at_end early_stopping_patience predict_samples
        verify_adapter verify_kernel resume_adapter
        ignore_plan config"""
    assert set(contract.split()) <= names


def test_options_document_is_the_table():
    text = (ROOT / "docs" / "options.md").read_text()
    assert text.endswith("\n\n" + format_options_table(OPTIONS))


def test_config_imports_no_torch():
    code = (
        "import sys, megablocks_utils.config, megablocks_utils.processes.entry_point; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")
