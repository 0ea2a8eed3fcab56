"""Sizes in a model's config.json, before anything is built of them."""

from pathlib import Path

import pytest

from megablocks_utils.config.model_sizes import check_model_sizes
from megablocks_utils.errors import CheckpointError

PATH = Path("model/config.json")


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "num_experts", "hidden_size"])
@pytest.mark.parametrize("value", [10**12, 10**40, 0, -1, 2.0, 1e30, True, "8", None, [8], {}])
def test_a_size_that_no_model_has(name, value):
    with pytest.raises(CheckpointError, match=rf"^{name} is .* in {PATH}, but it must be a?") as e:
        check_model_sizes({name: value}, PATH)
    assert len(str(e.value)) < 160


def test_sizes_that_models_have():
    check_model_sizes({"num_hidden_layers": 126, "vocab_size": 262_144, "head_dim": None}, PATH)
    check_model_sizes({"model_type": "mixtral", "sliding_window": None}, PATH)
