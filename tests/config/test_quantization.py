"""Packed experts are refused beside what has not been proven with them, in a sentence."""

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.config.quantization import check_packed_slices
from megablocks_utils.errors import ConfigurationError

NF4 = ["--model_name_or_path", "m", "--data_path", "d", "--expert_quantization", "nf4"]
LORA = [*NF4, "--use_lora", "all", "--use_megablocks_sharding", "True"]


def test_packed_experts_lie_as_others_do():
    assert parse_args(LORA, entry_point="fsdp2").parallel.expert_dp == "shard"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (NF4, "--use_lora is none, which trains the experts"),
        ([*LORA, "--kernel", "megablocks"], "--kernel megablocks has not been tried"),
        ([*LORA, "--use_scattermoe", "True"], "--kernel scattermoe has not been tried"),
    ],
)
def test_it_is_refused_beside(words, wanted):
    with pytest.raises(ConfigurationError) as caught:
        parse_args(words, entry_point="fsdp2")
    assert str(caught.value).startswith("--expert_quantization is nf4, but")
    assert wanted in str(caught.value)


@pytest.mark.parametrize(("name", "size", "slices"), [("nf4", 192, "1 or 3"), ("int8", 384, "1")])
def test_slices_go_through_no_block(name, size, slices):
    with pytest.raises(ConfigurationError, match=rf"expert_tp_size is 2, .* must be {slices}\.$"):
        check_packed_slices(name, size, 2)
    check_packed_slices(name, 512, 2)
