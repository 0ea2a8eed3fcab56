"""Packed experts are refused beside what has not been proven with them, in a sentence."""

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.errors import ConfigurationError

NF4 = ["--model_name_or_path", "m", "--data_path", "d", "--expert_quantization", "nf4"]
LORA = [*NF4, "--use_lora", "all", "--use_megablocks_sharding", "True"]


def test_copies_are_kept_of_packed_experts():
    assert parse_args(LORA, entry_point="fsdp2").parallel.expert_dp == "replicate"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (NF4, "--use_lora is none, which trains the experts"),
        ([*LORA, "--expert_dp", "shard"], "--expert_dp is shard and must be replicate"),
        ([*LORA, "--expert_tp_size", "2"], "--expert_tp_size is 2"),
        ([*LORA, "--cpu_offload", "params"], "--cpu_offload is params"),
        ([*LORA, "--compile", "True"], "--compile is True"),
    ],
)
def test_it_is_refused_beside(words, wanted):
    with pytest.raises(ConfigurationError) as caught:
        parse_args(words, entry_point="fsdp2")
    assert str(caught.value).startswith("--expert_quantization is nf4, but")
    assert wanted in str(caught.value)
