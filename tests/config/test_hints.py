"""What an unknown option is taken for: its meaning, a slip of the pen, or nothing."""

import pytest

from megablocks_utils.config.entry_points import SCRIPTS
from megablocks_utils.config.hints import find_hint, unknown_option
from megablocks_utils.config.other_trainers import SYNONYMS

KNOWN = SCRIPTS["fsdp2"].names

MEANT = {
    # other trainers' names
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "sequence_len": "max_seq_length",
    "max_length": "max_seq_length",
    "dataset": "data_path",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "bf16": "precision",
    "expert_parallel_size": "ep_size",
    # slips
    "learning_rat": "learning_rate",
    "expert_degre": "expert_degree",
    "Learning_Rate": "learning_rate",
    "gradient_acumulation_step": "gradient_accumulation_steps",
    # whole words
    "shuffle_data": "shuffle",
    "aux_loss": "router_aux_loss_coef",
    "warmup_num_steps": "warmup_steps",
    # nothing near, or not built yet
    "load_in_4bit": "expert_quantization",
    "lora_modules": "lora_target",
    "frobnicate": None,
    "name": None,
}


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant(name):
    assert find_hint(name, KNOWN) == MEANT[name]


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--learning-rat", "unknown option --learning-rat; did you mean --learning_rate?"),
        ("--val_set_size", "unknown option --val_set_size; did you mean --eval_fraction?"),
        ("--load_in_4bit", "unknown option --load_in_4bit; did you mean --expert_quantization?"),
        ("--frobnicate", "unknown option --frobnicate; --help lists all options."),
    ],
)
def test_sentences(flag, sentence):
    assert str(unknown_option(flag, KNOWN)) == sentence


def test_every_name_of_the_lists_is_of_some_use():
    """A synonym leads to an option."""
    assert {SYNONYMS[name] for name in SYNONYMS} <= set(KNOWN)
    assert not set(SYNONYMS) & set(KNOWN)
