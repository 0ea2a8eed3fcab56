"""What a model does to its logits is seen on meta, or said to be unknown."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils.training.step.learn_logits_map import find_logits_map
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap

VOCAB = 128
NO_PAD = torch.arange(VOCAB) != 3


@pytest.fixture
def model():
    config = MixtralConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    with torch.device("meta"):
        return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda x: x.float(), LogitsMap()),
        (lambda x: x / 8, LogitsMap(0.125)),
        (lambda x: 30 * torch.tanh(x / 30), LogitsMap(1.0, 30.0)),
        (lambda x: 20 * torch.tanh(x * 0.25 / 20), LogitsMap(0.25, 20.0)),
        (lambda x: x[..., :100], LogitsMap(num_tokens=100)),
        (lambda x: x + torch.arange(VOCAB), None),
        (lambda x: x.where(NO_PAD, float("-inf")), None),
        (lambda x: x.clamp(-50, 50), None),
        (lambda x: x.relu(), None),
        (lambda x: x * 0, None),
        (lambda x: x.bfloat16(), None),
        (lambda x: x.log_softmax(-1), None),
        (lambda x: x.flip(-1), None),
        (lambda x: x[..., -100:], None),
        (lambda x: x[:, -1:], None),
        (lambda x: x.missing, None),
    ],
)
def test_a_function_of_the_logits_is_recognised_or_not_known(model, change, wanted):
    def apply(_model, _args, outputs):
        outputs.logits = change(outputs.logits)
        return outputs

    model.register_forward_hook(apply)
    found, reason = find_logits_map(model)
    assert bool(reason) == (wanted is None)
    if wanted is None:
        assert found is None
    else:
        assert found.num_tokens == wanted.num_tokens
        assert found.scale == pytest.approx(wanted.scale, rel=1e-6)
        assert found.cap == (wanted.cap and pytest.approx(wanted.cap, rel=1e-6))
    assert "forward" not in vars(model.lm_head)
    assert "forward" not in vars(model.model)


class Doubled(nn.Linear):
    """A head that does something else than its class says."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_only_a_linear_layer_that_is_called_once_is_a_known_head(model):
    model.lm_head, plain = Doubled(32, VOCAB, device="meta"), model.lm_head
    assert "Doubled" in find_logits_map(model)[1]
    model.lm_head = plain
    assert find_logits_map(model)[0] == LogitsMap()

    def call_again(*_):
        plain(torch.zeros(1, 2, 32))

    model.register_forward_hook(call_again)
    assert find_logits_map(model)[0] is None
