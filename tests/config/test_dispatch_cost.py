"""How tokens travel: by bytes, as asked for, or not where that would be wrong."""

from itertools import combinations

import pytest
import torch

from megablocks_utils.config.dispatch_cost import TokenTraffic, choose_dispatch
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.expert_spec import ExpertSpec
from megablocks_utils.moe.once_per_rank import choose_layer_dispatch

QWEN3 = TokenTraffic(num_experts=128, top_k=8, ep_size=8, hidden_bytes=4096)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "ep_size"), [(8, 3, 4), (6, 2, 2), (6, 5, 3), (4, 1, 2), (5, 2, 1)]
)
def test_ranks_of_a_token_by_counting(num_experts, top_k, ep_size):
    per_rank = num_experts // ep_size
    chosen = list(combinations(range(num_experts), top_k))
    ranks = sum(len({expert // per_rank for expert in experts}) for experts in chosen)
    traffic = TokenTraffic(num_experts, top_k, ep_size, 1)
    assert traffic.ranks_per_token == pytest.approx(ranks / len(chosen))


def test_bytes_of_a_token():
    """Four times a hidden state for each place elsewhere; twelve bytes more for each row."""
    assert pytest.approx(5.33, abs=0.01) == QWEN3.ranks_per_token
    assert QWEN3.row_bytes == 4 * 7 * 4096
    away = QWEN3.ranks_per_token * 7 / 8
    assert QWEN3.token_bytes == pytest.approx(4 * away * 4096 + 12 * 7)


@pytest.mark.parametrize(
    ("traffic", "name"),
    [
        (QWEN3, "tokens"),
        (TokenTraffic(128, 8, 128, 4096), "rows"),  # one expert a rank
        (TokenTraffic(128, 1, 2, 4096), "rows"),  # one expert a token
        (TokenTraffic(128, 8, 64, 4096), "rows"),  # 2.7 % fewer bytes
        (TokenTraffic(16, 4, 4, 8), "rows"),  # hidden states as small as the routing
        (TokenTraffic(8, 2, 1, 4096), "rows"),  # no token leaves its rank
        (None, "rows"),  # experts of a token not known
    ],
)
def test_auto_takes_what_is_fewer_bytes(traffic, name):
    choice = choose_dispatch("auto", traffic, None)
    assert choice.name == name
    assert choose_dispatch("tokens", traffic, None).name == "tokens"
    if name == "tokens":
        assert choice.reason.startswith("a token sends 76,629 ")
        assert choice.reason.endswith("114,688 as rows")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ExpertSpec(8, 64, 32, has_post_norm=True), "norm behind the experts"),
        (ExpertSpec(8, 64, 32, is_weighted_before=True), "weights tokens before their experts"),
    ],
)
def test_what_needs_each_result_by_itself(spec, reason):
    options = {"top_k": 4, "ep_size": 2, "dtype": torch.float32}
    choice = choose_layer_dispatch("auto", spec, **options)
    assert choice.name == "rows"
    assert reason in choice.reason
    with pytest.raises(ConfigurationError, match=r"^token_dispatch is tokens, but .*auto or rows"):
        choose_layer_dispatch("tokens", spec, **options)
