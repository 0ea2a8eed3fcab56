"""Errors name parameters to Python callers, and options to those who call a command."""

import pickle

import pytest

from megablocks_utils.errors import ConfigurationError, DataError, UserError


def test_parameters_become_options():
    error = ConfigurationError("ep_size is 3, but ep_size must divide 8.", parameters=("ep_size",))
    assert str(error) == "ep_size is 3, but ep_size must divide 8."
    assert error.as_options() == "--ep_size is 3, but --ep_size must divide 8."
    assert error.as_options({"ep_size": "expert_degree"}).startswith("--expert_degree is 3")


def test_a_name_at_the_end_of_a_sentence():
    error = UserError("give lora_r or lora_alpha.", parameters=("lora_r", "lora_alpha"))
    assert error.as_options() == "give --lora_r or --lora_alpha."


@pytest.mark.parametrize(
    "message",
    [
        "/runs/data_path/x.json is empty",
        "/runs/data_path.json is empty",
        "runs-data_path is empty",
        "my_data_path is empty",
        "data_paths are empty",
        "--data_path is empty",
    ],
)
def test_what_only_looks_like_a_parameter_stays(message):
    assert DataError(message, parameters=("data_path",)).as_options() == message


def test_parameters_travel_to_other_ranks():
    error = pickle.loads(pickle.dumps(DataError("data_path is x", parameters=("data_path",))))
    assert error.as_options() == "--data_path is x"
