"""Attention in blocks is that of a mask of all tokens by all, in values and gradients."""

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from megablocks_utils.attention import varlen_attention
from megablocks_utils.attention.causal_blocks import CausalBlocks
from megablocks_utils.attention.implementation import set_implementation, set_named_implementation
from megablocks_utils.attention.varlen_attention import attend
from megablocks_utils.attention.varlen_interface import example_lengths
from megablocks_utils.errors import ConfigurationError
from tests.support.compare import relative_error
from tests.support.tiny_families import build_tiny

CPU = torch.device("cpu")
ROWS = {"one row": (1, (11, 150, 1, 38)), "two padded rows": (2, (70, 30, 100))}
SHAPES = {  # heads of keys, size of a head, size of its values, window, whether there are sinks
    "plain": (4, 16, 16, None, False),
    "groups, window": (2, 16, 16, 5, False),
    "wide queries, sinks": (4, 24, 16, None, True),
    "wide values, one key head, long window, sinks": (1, 8, 20, 70, True),
}
SCALE = 0.3


def attend_densely(query, key, value, lengths, window, sinks):
    """The formula, with all logits of all tokens."""
    num_rows, num_heads, num_tokens, _ = query.shape
    key, value = (t.repeat_interleave(num_heads // t.shape[1], dim=1) for t in (key, value))
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    number, place = number.view(num_rows, num_tokens), torch.arange(num_tokens)
    back = place[:, None] - place
    is_seen = (number[:, :, None] == number[:, None]) & (back >= 0)
    is_seen &= back < (window or num_tokens)
    logits = (query @ key.mT * SCALE).masked_fill(~is_seen[:, None], float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)), -1)
    return (logits.softmax(-1)[..., :num_tokens] @ value).transpose(1, 2)


@pytest.mark.parametrize("way", ["pieces", "plainly"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, shape, rows, way):
    num_rows, lengths = ROWS[rows]
    num_key_heads, size, value_size, window, has_sinks = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).requires_grad_()

    num_tokens = sum(lengths) // num_rows
    tensors = [draw(num_rows, n, num_tokens, d) for n, d in ((4, size), (num_key_heads, size))]
    tensors.append(draw(num_rows, num_key_heads, num_tokens, value_size))
    sinks = draw(4) if has_sinks else None
    inputs = [*tensors, sinks] if has_sinks else tensors
    if way == "plainly":
        plainly = varlen_attention._attend_plainly
        monkeypatch.setattr(
            varlen_attention._PieceAttention,
            "apply",
            lambda q, k, v, sinks, blocks, scale: plainly(q, k, v, blocks, scale, sinks),
        )
    blocks = CausalBlocks(lengths, window, CPU)
    output = attend(*tensors, blocks, scale=SCALE, sinks=sinks)
    wanted = attend_densely(*tensors, lengths, window, sinks)
    grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    pairs = zip(
        (output, *torch.autograd.grad(output, inputs, grad)),
        (wanted, *torch.autograd.grad(wanted, inputs, grad)),
        strict=True,
    )
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 1e-12


def test_a_kernel_that_is_wrong_on_a_device_is_noticed(monkeypatch):
    plainly = varlen_attention._attend_plainly

    def without_window(query, key, value, blocks, scale, sinks):
        return plainly(query, key, value, CausalBlocks(blocks.lengths, None, CPU), scale, sinks)

    monkeypatch.setattr(varlen_attention, "serves_flash", lambda *_: True)
    monkeypatch.setattr(varlen_attention, "attend_flash", plainly)
    assert varlen_attention.find_flash_fault(CPU) == ""
    monkeypatch.setattr(varlen_attention, "attend_flash", without_window)
    assert "torch's kernel differs by" in varlen_attention.find_flash_fault(CPU)


@pytest.fixture
def config():
    model = build_tiny("llama4_text", attention_chunk_size=8)
    set_implementation(model, "varlen")
    return model.config


def make_mask(make, config, num_tokens, **more):
    embeddings = torch.empty(1, num_tokens, 0)
    return make(config, embeddings, more.pop("attention_mask", None), None, **more)


def test_what_is_told_becomes_blocks_whatever_the_positions_say(config):
    with example_lengths([(3, 9)]):
        assert make_mask(create_causal_mask, config, 12).lengths == (3, 9)
        chunks = make_mask(create_chunked_causal_mask, config, 12)
    assert chunks.lengths == (3, 8, 1)
    assert make_mask(create_causal_mask, config, 12).lengths == (12,)


def test_untold_rows_of_several_examples_have_a_mask(config):
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    mask = make_mask(create_causal_mask, config, 5, position_ids=positions)
    assert mask[0, 0].tolist()[3] == [False, False, True, True, False]


def test_other_masks_are_refused(config, monkeypatch):
    def see_all(*index):
        return index[-1] >= 0

    with example_lengths([(3, 9)]), pytest.raises(ValueError, match="not a causal one"):
        make_mask(create_causal_mask, config, 12, or_mask_function=see_all)
    with example_lengths([(3, 9)]), pytest.raises(ValueError, match="not of the rows"):
        make_mask(create_causal_mask, config, 13)
    # A release of transformers whose masks are made otherwise.
    monkeypatch.setattr(masking_utils, "causal_mask_function", see_all)
    with example_lengths([(3, 9)]), pytest.raises(ValueError, match="not a causal one"):
        make_mask(create_causal_mask, config, 12)


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        ("mixtral", "flash_attention_9", "transformers has none of that name"),
        ("gpt_oss", "sdpa", "does not support"),
    ],
)
def test_an_implementation_that_cannot_be_is_refused(model_type, name, reason):
    with pytest.raises(ConfigurationError, match=f"attn_implementation is {name}, but .*{reason}"):
        set_named_implementation(build_tiny(model_type), name)
