"""Loss and gradients of the label tokens against transformers' own ``labels=`` loss."""

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils.training.data.batches import build_step_plan
from megablocks_utils.training.step.forward import run_loss
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap
from megablocks_utils.training.step.objective import label_positions, token_loss_sum
from tests.support.tokenized import examples_of


def tiny_mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=None,
        router_aux_loss_coef=0.0,
    )
    return MixtralForCausalLM(config)


def make_examples():
    generator = torch.Generator().manual_seed(1)
    encoded = []
    for length, num_prompt in ((9, 4), (2, 1), (17, 1), (12, 11), (5, 0)):
        ids = torch.randint(96, (length,), generator=generator).tolist()
        labels = [-100] * num_prompt + ids[num_prompt:]
        encoded.append((ids, labels))
    encoded[2][1][6] = -100
    return examples_of(encoded)


def our_loss(model, micro_batch):
    return run_loss(model, micro_batch, torch.device("cpu"), LogitsMap())[1]


def stock_loss(model, ids, labels):
    """Sum of the token losses of one example, computed by transformers."""
    ids, labels = torch.tensor(ids)[None], torch.tensor(labels)[None]
    return model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=1).loss


def test_positions_are_those_whose_next_token_is_learned():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7]])
    found = label_positions(labels)
    assert found.columns.tolist() == [0, 1, 4]
    assert found.targets.tolist() == [5, 6, 7]


def test_a_packed_row_has_the_loss_and_gradients_of_its_examples_apart():
    examples = make_examples()
    stock, ours = tiny_mixtral(), tiny_mixtral()
    plan = build_step_plan(
        examples,
        range(5),
        0,
        world_size=1,
        rank=0,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
    )
    losses = [stock_loss(stock, *examples[i]) for i in range(5)]
    sum(losses).backward()
    loss = our_loss(ours, plan.micro_batches[0])
    loss.backward()
    assert plan.num_label_tokens == 5 + 1 + 15 + 1 + 4
    torch.testing.assert_close(loss, sum(losses).detach(), rtol=1e-6, atol=0)
    reference = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - reference[name].grad).norm() / reference[name].grad.norm()
        assert error < 1e-6, name


def test_a_row_without_labels_has_zero_loss_and_zero_gradients():
    model = tiny_mixtral()
    plan = build_step_plan(
        make_examples(),
        range(1),
        0,
        world_size=2,
        rank=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    assert plan.micro_batches[0].is_dummy
    loss = our_loss(model, plan.micro_batches[0])
    loss.backward()
    assert loss.item() == 0.0
    assert model.lm_head.weight.grad.abs().max().item() == 0.0
    assert model.model.layers[0].mlp.experts.down_proj.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, 300, 96, generator=generator) * 3).to(dtype)
    targets = torch.randint(96, (300,), generator=generator)
    loss = token_loss_sum(logits, targets)
    exact = -logits[0].double().log_softmax(-1)[torch.arange(300), targets].sum()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) / exact.item() < 1e-6


def test_gradients_do_not_depend_on_how_the_examples_are_dealt():
    """One rank with rows of two, against rows of one: the same sums."""
    examples, grads = make_examples(), []
    for batch, accumulation in ((2, 3), (1, 5)):
        model = copy.deepcopy(tiny_mixtral())
        plan = build_step_plan(
            examples,
            range(5),
            0,
            world_size=1,
            rank=0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        for micro_batch in plan.micro_batches:
            our_loss(model, micro_batch).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-6
