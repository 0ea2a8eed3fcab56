"""The loss in blocks against all logits at once: values, every gradient, and what is allocated."""

import pytest
import torch
import torch.nn.functional as F

from megablocks_utils.planning.memory import loss_blocks
from megablocks_utils.training.data.batches import Packing, collate_examples
from megablocks_utils.training.step.forward import run_loss
from megablocks_utils.training.step.learn_logits_map import learn_logits_map
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap, linear_cross_entropy
from tests.support.allocations import LargestResult
from tests.support.tiny_families import build_tiny
from tests.support.tokenized import examples_of

CPU = torch.device("cpu")
ROWS, HIDDEN, VOCAB = 50, 32, 97
MAPS = (LogitsMap(), LogitsMap(0.125), LogitsMap(0.5, 3.0), LogitsMap(num_tokens=90))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of few rows and of few tokens, neither of which divides."""
    monkeypatch.setattr(loss_blocks, "_BLOCK_BYTES", 4 * VOCAB * 7)


@pytest.mark.parametrize(
    ("family", "fields", "logits_map"),
    [
        ("gemma4_text", {"final_logit_softcapping": 0.5}, LogitsMap(cap=0.5)),  # its head is tied
        ("granitemoe", {"logits_scaling": 4.0}, LogitsMap(0.25)),
        ("phimoe", {"lm_head_bias": True}, LogitsMap()),
    ],
)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_model_has_the_loss_and_gradients_of_stock(family, fields, logits_map, is_frozen):
    model = build_tiny(family, **fields)
    head = model.get_output_embeddings()
    head.requires_grad_(not is_frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(3, 40)
    stock = model(input_ids=ids[None], labels=ids[None], use_cache=False, num_items_in_batch=1).loss
    wanted = torch.autograd.grad(stock, list(trained.values()), allow_unused=True)
    assert learn_logits_map(model) == logits_map
    [batch] = [collate_examples(examples_of([(ids.tolist(), ids.tolist())]), [0], Packing.ALONE)]
    _, loss = run_loss(model, batch, CPU, logits_map)
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    torch.testing.assert_close(loss, stock.detach(), rtol=1e-6, atol=0)
    for name, ours, theirs in zip(trained, found, wanted, strict=True):
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


@pytest.mark.parametrize("logits_map", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_as_near_as_those_of_all_logits_at_once(logits_map, dtype):
    parts, targets = make_head(dtype, ROWS)
    exact = gradients(whole_loss, [p.detach().double() for p in parts], targets, logits_map)
    whole = gradients(whole_loss, parts, targets, logits_map)
    ours = gradients(block_loss, parts, targets, logits_map)
    for found, stock, right in zip(ours, whole, exact, strict=True):
        own_error = 0.0 if dtype == torch.float64 else (stock.double() - right).norm()
        assert (found.double() - right).norm() <= 1.5 * own_error + 1e-12 * right.norm()


def test_the_sum_is_in_fp32_and_without_rows_a_zero_with_gradients():
    for rows in (ROWS, 0):
        parts, targets = make_head(torch.bfloat16, rows)
        loss, no_logits = linear_cross_entropy(*parts, targets, LogitsMap())
        logits = F.linear(parts[0], parts[1], parts[2]).double()
        exact = F.cross_entropy(logits, targets, reduction="sum").item()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-6)
        assert no_logits.shape == (1, 0, VOCAB)
    grads = torch.autograd.grad(loss + no_logits.sum(), parts)
    assert [grad.shape for grad in grads] == [part.shape for part in parts]
    assert not any(grad.count_nonzero() for grad in grads)


def test_all_logits_are_never_there():
    parts, targets = make_head(torch.float32, 2000)
    with LargestResult() as largest:
        linear_cross_entropy(*parts, targets, LogitsMap(0.5, 3.0))[0].backward()
    assert largest.num_elements == parts[0].numel() < 2000 * VOCAB / 3


def test_a_head_that_is_not_trained_is_multiplied_with_twice():
    """Once for the logits and once for the rows' gradients, as with all logits at once."""
    parts, targets = make_head(torch.float32, ROWS)
    parts[1].requires_grad_(False)
    parts[2].requires_grad_(False)
    with torch.profiler.profile(with_flops=True) as profile:
        linear_cross_entropy(*parts, targets, LogitsMap())[0].backward()
    flops = sum(event.flops for event in profile.key_averages())
    assert 2 * 2 * ROWS * VOCAB * HIDDEN <= flops < 2.1 * 2 * ROWS * VOCAB * HIDDEN


def make_head(dtype, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    shapes = ((num_rows, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    targets = torch.randint(90, (num_rows,), generator=generator)
    return [part.requires_grad_() for part in parts], targets


def block_loss(hidden, weight, bias, targets, logits_map):
    return linear_cross_entropy(hidden, weight, bias, targets, logits_map)[0]


def whole_loss(hidden, weight, bias, targets, logits_map):
    logits = F.linear(hidden, weight, bias) * logits_map.scale
    if logits_map.cap is not None:
        logits = torch.tanh(logits / logits_map.cap) * logits_map.cap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits[:, : logits_map.num_tokens], targets, reduction="sum")


def gradients(loss, parts, targets, logits_map):
    parts = [part.requires_grad_() for part in parts]
    return torch.autograd.grad(loss(*parts, targets, logits_map) / 1000, parts)
