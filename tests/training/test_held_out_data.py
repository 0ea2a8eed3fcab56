"""Which data is held out: a path and a split of its own."""

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.errors import DataError
from megablocks_utils.training.evaluation.held_out_data import choose_held_out

HELD_OUT = "--eval_strategy steps --eval_data_path"


def _load(config):
    """Say what would be loaded; refuse a split of the held-out data as the loader does."""
    data = config.data
    if data.dataset_split == "none":
        raise DataError(
            "dataset_split is none, but data_path x is a file", parameters=("dataset_split",)
        )
    return data.data_path, data.dataset_config, data.dataset_split


@pytest.mark.parametrize(
    ("words", "held_out"),
    [
        (f"{HELD_OUT} owner/b", (("owner/b",), "c", "train[:9]")),
        (f"{HELD_OUT} owner/b --eval_dataset_split test", (("owner/b",), "c", "test")),
        (f"{HELD_OUT} {__file__}", ((__file__,), None, "train")),
    ],
)
def test_the_split_is_its_own_or_that_of_training(words, held_out):
    given = f"--data_path owner/a --dataset_config c --dataset_split train[:9] {words}"
    config = parse_args(given.split(), entry_point="fsdp2")
    trained = (("owner/a",), "c", "train[:9]")
    assert choose_held_out(config, _load) == (trained, held_out)


def test_a_refusal_names_the_option_that_was_given():
    words = f"--data_path owner/a {HELD_OUT} owner/b --eval_dataset_split none"
    with pytest.raises(DataError) as caught:
        choose_held_out(parse_args(words.split(), entry_point="fsdp2"), _load)
    assert caught.value.as_options() == (
        "--eval_dataset_split is none, but --eval_data_path x is a file"
    )
