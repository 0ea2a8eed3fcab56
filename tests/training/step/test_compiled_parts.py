"""Dense parts of layers are compiled once for all layers and lengths, with the same results."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from megablocks_utils.attention.implementation import set_implementation
from megablocks_utils.attention.varlen_interface import VARLEN, example_lengths
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.step.compile_probe import find_eager_parts
from megablocks_utils.training.step.compiled_parts import check_compiler, compile_parts
from tests.support.compare import relative_error
from tests.support.tiny_models import build_tiny_model

BOUND = 1e-10  # in fp64: what is wrong is off by far more


@pytest.fixture(autouse=True)
def _no_code_is_left():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_gpt_oss_has_the_same_gradients_and_one_code_for_all_layers_and_lengths():
    """Windows in every other layer, sinks, biases; examples one by one, without a mask."""
    stock = build_tiny_model("gpt_oss", num_hidden_layers=2, sliding_window=8).double().train()
    set_implementation(stock, VARLEN)
    stock.set_experts_implementation("eager")  # torch's grouped matmul takes no fp64
    model = copy.deepcopy(stock)
    names = set(model.state_dict())
    refused: list[str] = []
    codes = compile_parts(model, backend="aot_eager", report=refused.append)
    assert names == set(model.state_dict())
    for length in (37, 24):
        wanted, seen = _gradients(stock, length), _gradients(model, length)
        assert wanted.keys() == seen.keys()
        assert max(relative_error(seen[name], wanted[name]) for name in wanted) < BOUND
    assert refused == []
    # Attention is computed between two graphs; one of the three is for layers with a window.
    counts = {code.kind.__name__: code.num_graphs for code in codes}
    assert counts == {"GptOssAttention": 3, "GptOssTopKRouter": 1, "GptOssRMSNorm": 1}
    assert all("attention is computed as without" in text for text in counters["graph_break"])


def _gradients(model: nn.Module, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(128, (1, length), generator=generator)
    model.zero_grad()
    with example_lengths([[9, length - 9]]):
        model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class _Branches(nn.Module):
    """A norm that looks at values."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        return normed if normed.sum().item() < 1e9 else hidden_states


class _Loops(_Branches):
    """A norm that goes from token to token."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = [self.norm(hidden_states[:, t]) for t in range(0, hidden_states.shape[1], 8)]
        return self.norm(hidden_states) + tokens[0][:, None] * 0


def test_what_cannot_be_compiled_is_named_and_runs_eager():
    model = build_tiny_model("mixtral", num_hidden_layers=1)
    layer = model.model.layers[0]
    layer.input_layernorm = _Branches(layer.input_layernorm)
    layer.post_attention_layernorm = _Loops(layer.post_attention_layernorm)
    wanted = model(input_ids=torch.arange(5)[None]).logits
    eager = find_eager_parts(model, attention="sdpa", has_router_logits=True)
    assert eager.keys() == {"_Branches", "_Loops"}
    assert "data-dependent" in eager["_Branches"]
    assert eager["_Loops"] == "it would be compiled for each number of tokens"
    assert "forward" not in vars(layer.self_attn)
    # A run that was not told finds out when it calls them.
    refused: list[str] = []
    compile_parts(model, backend="eager", eager={"_Loops": "known"}, report=refused.append)
    assert torch.equal(model(input_ids=torch.arange(5)[None]).logits, wanted)
    assert [line.partition(": ")[2].partition(":")[0] for line in refused] == [
        "_Branches is not compiled"
    ]


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/none/g++",))
    with pytest.raises(ConfigurationError, match="/none/g") as error:
        check_compiler(torch.device("cpu"))
    assert error.value.as_options().startswith("--compile is True, but it must be False on this ma")
    assert error.value.as_options().count("--compile") == 1
