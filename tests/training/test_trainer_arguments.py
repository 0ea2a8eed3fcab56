"""Which of Trainer's options pass, which are this project's, which are refused and how."""

import json

import pytest

from megablocks_utils.config import RunConfig, parse_known_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.trainer_arguments import build_trainer_arguments, parse_trainer_flags

REFUSED = {
    "--adam_beta2 0.95": "--adam_beta2 is 0.95, but the optimizer is AdamW with betas 0.9 and "
    "0.999 and eps 1e-8.",
    "--fsdp full_shard": "--fsdp is full_shard, but FSDP is set up from accelerate.yaml and the "
    "options of this script.",
    "--deepspeed zero3.json": "--deepspeed is zero3.json, but FSDP is set up from accelerate.yaml "
    "and the options of this script.",
    "--auto_find_batch_size True": "--auto_find_batch_size is True, but the batch size is part of "
    "what a step means.",
    "--auto_find_batch_size": "--auto_find_batch_size is True, but the batch size is part of what "
    "a step means.",
    "--metric_for_best_model f1": "--metric_for_best_model is f1, but the best checkpoint is the "
    "one with the lowest eval_loss.",
    '--gradient_checkpointing_kwargs {"use_reentrant":true}': "--gradient_checkpointing_kwargs is "
    '{"use_reentrant":true}, but --gradient_checkpointing True, False or selective says all there '
    "is to say.",
    "--enable_jit_checkpoint True": "--enable_jit_checkpoint is True, but SIGTERM and SIGINT save "
    "a checkpoint already.",
    "--save_only_model True": "--save_only_model is True, but a checkpoint holds all that a run "
    "needs to resume; the final model is written by itself.",
    "--save_on_each_node True": "--save_on_each_node is True, but all machines write their parts "
    "of one checkpoint into one --output_dir.",
    "--ignore_data_skip True": "--ignore_data_skip is True, but a run resumes at its place "
    "in the data.",
    "--learning_rat 1": "unknown option --learning_rat; did you mean --learning_rate?",
    "--adam_epsilo 1": "unknown option --adam_epsilo; did you mean --adam_epsilon?",
    "--ddp_timeout soon": "--ddp_timeout is soon, but it must be a whole number.",
}
"""Words of the command line -> the sentence they are answered with."""


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words):
    with pytest.raises(ConfigurationError) as error:
        parse_trainer_flags(_leftovers(words))
    assert str(error.value) == REFUSED[words]


def test_an_unknown_key_of_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("adam_epsilon: 1e-8\nadam_epsilo: 1e-8\n")
    with pytest.raises(ConfigurationError) as error:
        parse_trainer_flags(_leftovers(f"--config {path}"))
    assert str(error.value) == (
        f"{path}:2: unknown option --adam_epsilo; did you mean --adam_epsilon?"
    )


def _leftovers(words):
    return parse_known_args(words.split(), entry_point="fsdp1")[1]


def _build(words):
    config, leftovers = parse_known_args(words.split(), entry_point="fsdp1")
    return build_trainer_arguments(parse_trainer_flags(leftovers), config, "cpu")


def test_both_kinds_of_options_arrive(tmp_path):
    path = tmp_path / "accelerator_config.json"
    path.write_text('{"split_batches": false, "even_batches": true}')
    arguments = _build(
        f"--accelerator_config {path} --output_dir {tmp_path} --torch_dtype bfloat16 "
        "--per_device_eval_batch_size 1 --evaluation_strategy no --save_strategy steps "
        "--learning_rate 3e-4 --gradient_accumulation_steps 16 --gradient_checkpointing True "
        "--optim adamw_torch --run_name mine --logging_steps 7 --sync_each_batch False"
    )
    assert arguments.run_name == "mine"
    assert arguments.per_device_eval_batch_size == 1
    assert arguments.learning_rate == 3e-4
    assert arguments.gradient_accumulation_steps == 16
    assert arguments.logging_steps == 7
    assert arguments.report_to == []
    assert arguments.save_strategy == "no"  # checkpoints are this project's
    assert arguments.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": False}
    assert not arguments.bf16
    assert not arguments.activation_checkpointing  # the model has ours


def test_trainer_itself_reports_nowhere(tmp_path):
    assert _build(f"--output_dir {tmp_path} --report_to tensorboard").report_to == []


def test_what_training_arguments_refuse_is_one_sentence(tmp_path):
    flags = parse_trainer_flags(_leftovers(f"--accelerator_config {tmp_path / 'none.json'}"))
    with pytest.raises(ConfigurationError) as error:
        build_trainer_arguments(flags, RunConfig(output_dir=str(tmp_path)), "cpu")
    assert str(error.value).startswith("transformers.TrainingArguments refuses these options: ")
    assert "none.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split_batches": True}, "split_batches is true in --accelerator_config, but it must be "),
        ({"split_batches": "yes"}, "split_batches is yes in "),
        ({"dispatch_batches": True}, "dispatch_batches is true .* must be null or false, since"),
        ({"use_seedable_sampler": False}, "use_seedable_sampler is false .* must be true, since"),
        ({"non_blocking": True}, "non_blocking is true in "),
        ({"even_batches": 1}, "even_batches is 1 in "),
        (
            {"gradient_accumulation_kwargs": {"num_steps": 2}},
            "gradient_accumulation_kwargs is .* must be null, since accumulation follows "
            "--gradient_accumulation_steps",
        ),
    ],
)
def test_settings_of_a_data_loader_are_refused(settings, sentence, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match=f"^{sentence}"):
        _build(f"--output_dir {tmp_path} --accelerator_config {path}")


@pytest.mark.parametrize("text", ["1_0", "9" * 20, "٣", "1e400"])
@pytest.mark.parametrize("name", ["dataloader_num_workers", "adam_epsilon"])
def test_numbers_are_read_as_those_of_our_own_options(name, text):
    if (name, text) == ("adam_epsilon", "9" * 20):
        text = "inf"
    with pytest.raises(ConfigurationError, match=f"^--{name} is .*, but it must be "):
        parse_trainer_flags(_leftovers(f"--{name} {text}"))


def test_use_cpu_beside_a_gpu_is_refused(tmp_path):
    flags = parse_trainer_flags(_leftovers("--use_cpu True"))
    with pytest.raises(ConfigurationError, match="^--use_cpu is True, but a GPU is used"):
        build_trainer_arguments(flags, RunConfig(output_dir=str(tmp_path)), "cuda")
