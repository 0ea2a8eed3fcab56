"""Routers: found by what they do, frozen, and balanced by their correction biases."""

import pytest
import torch

from megablocks_utils.config import OptimConfig, RunConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.training.data.batches import Packing, collate_examples
from megablocks_utils.training.report.summary import build_console
from megablocks_utils.training.step.aux_loss import AuxLoss, choose_aux_loss
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.step.model_probe import (
    apply_router_options,
    probe_model,
)
from megablocks_utils.training.step.routing_hooks import RoutingHooks
from megablocks_utils.training.step.small_model import build_small_model
from tests.support.tiny_families import build_tiny
from tests.support.tokenized import examples_of

CPU = torch.device("cpu")
LENGTHS = (5, 26, 11, 9)


def make_examples():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
    return examples_of([(row, [-100, *row[1:]]) for row in ids])


def apply(model, **optim):
    config = RunConfig(optim=OptimConfig(per_device_train_batch_size=1, **optim))
    probe = probe_model(config, model, CPU, build_console(False))
    return apply_router_options(config, model, probe, CPU, lambda *_: None).balance


def take_step(model, balance, packing, *micro_batches):
    """Run micro-batches forward and backward, and move the biases."""
    for rows in micro_batches:
        batch = collate_examples(make_examples(), rows, packing)
        loss = compute_micro_batch_loss(model, batch, LossWeights(1, 1), CPU, RoutingHooks(balance))
        loss.objective.backward()
    num_tokens = sum(LENGTHS[row] for rows in micro_batches for row in rows)
    counts = torch.cat(list(balance.routing.tokens.values()))
    assert counts.sum() == 3 * 2 * num_tokens  # once, also where layers are recomputed
    balance.update()


def count_stock(model):
    """Tokens of each expert when stock transformers sees the examples one at a time, (L, 8)."""
    counts = {name: torch.zeros(8, dtype=torch.long) for name in find_expert_modules(model)}

    def count(name, args):
        counts[name] += torch.bincount(args[1].flatten(), minlength=8)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: count(name, args))
        for name, module in find_expert_modules(model).items()
    ]
    with torch.no_grad():
        for ids, _ in (make_examples()[i] for i in range(len(LENGTHS))):
            model(input_ids=torch.tensor(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


def moved_by_hand(before, counts, rate):
    """The biases after a step, each value apart."""
    after = {}
    for name, bias in before.items():
        loads = counts[f"{name.rpartition('.mlp.')[0]}.mlp.experts"].tolist()
        mean = sum(loads) / len(loads)
        moves = [rate * ((mean > load) - (mean < load)) for load in loads]
        centre = sum(moves) / len(moves)
        after[name] = bias.flatten() + torch.tensor([move - centre for move in moves])
    return after


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize(
    ("packing", "micro_batches"),
    [(Packing.PADDED, [(0, 1, 2, 3)]), (Packing.POSITIONS, [(0, 1), (3, 2), ()])],
)
def test_biases_move_by_the_tokens_of_the_global_batch(model_type, packing, micro_batches):
    """Recomputation, accumulation, padding and a dummy change nothing."""
    model = build_tiny(model_type).train()
    balance = apply(model, router_bias_update_rate=0.25)
    before = {name: bias.clone() for name, bias in balance.tensors.items()}
    wanted = moved_by_hand(before, count_stock(model), 0.25)
    apply_gradient_checkpointing(model, "full")
    take_step(model, balance, packing, *micro_batches)
    assert len(wanted) == 3
    for name, bias in balance.tensors.items():
        torch.testing.assert_close(bias.flatten(), wanted[name], rtol=0, atol=1e-6)
        assert name in model.state_dict()
        assert not (bias.flatten() - before[name].flatten()).abs().max() < 0.1


def move_on_ranks(rank):
    """Each rank runs its half of the examples."""
    model = build_tiny("deepseek_v3").train()
    balance = apply(model, router_bias_update_rate=0.25)
    take_step(model, balance, Packing.PADDED, (2 * rank, 2 * rank + 1))
    return {name: bias.tolist() for name, bias in balance.tensors.items()}


def test_two_ranks_move_biases_as_one_process(ranks2):
    model = build_tiny("deepseek_v3").train()
    balance = apply(model, router_bias_update_rate=0.25)
    take_step(model, balance, Packing.PADDED, (0, 1, 2, 3))
    alone = {name: bias.tolist() for name, bias in balance.tensors.items()}
    assert ranks2.run(move_on_ranks) == [alone, alone]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mixtral", "no correction bias"), ("zaya", "gate.balancing_biases has 9 values for 8")],
)
def test_families_without_such_a_bias_are_refused(model_type, reason):
    with pytest.raises(ConfigurationError, match=f"must be 0 for .*{model_type}: .*{reason}"):
        apply(build_tiny(model_type), router_bias_update_rate=0.1)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma4_text", "jamba", "gpt_oss"])
def test_frozen_routers_are_all_routers_and_nothing_else(model_type):
    model = build_tiny(model_type)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    apply(model, freeze_router=True)
    frozen = trained - {n for n, p in model.named_parameters() if p.requires_grad}
    num_layers = len(find_expert_modules(model))
    assert frozen == {n for n in trained if ".router." in n or ".gate." in n}
    assert len(frozen) >= num_layers


def test_router_logits_alone_give_the_loss_of_the_scores():
    """Sigmoid scores over their sum take the place of the softmax in transformers' formula."""
    model = build_tiny("deepseek_v3")
    found = choose_aux_loss(build_small_model(model, CPU), 0.5)
    assert found == AuxLoss("sigmoid", 2)
    batch = collate_examples(make_examples(), (0, 1), Packing.PADDED)
    weights = LossWeights(1, 1, 0.5, found)
    padded = compute_micro_batch_loss(model, batch, weights, CPU)
    assert padded.aux_loss.item() == pytest.approx(aux_by_hand(model, (0, 1)), rel=1e-5)
    padded.objective.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.norm() > 0


def aux_by_hand(model, rows):
    """E times the sum of load times mean score, over all layers' tokens, without padding."""
    loads, scores = [], []
    for ids, _ in (make_examples()[i] for i in rows):
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor(ids)[None], output_router_logits=True)
        for logits in outputs.router_logits:
            score = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            loads.append(torch.zeros_like(score).scatter_(1, score.topk(2).indices, 1.0))
            scores.append(score)
    return (8 * (torch.cat(loads).mean(0) * torch.cat(scores).mean(0)).sum()).item()


def test_a_model_without_router_logits_is_refused():
    with pytest.raises(
        ConfigurationError, match="router_aux_loss_coef is 0.5, but it must be 0 for .*kimi_k25"
    ):
        choose_aux_loss(build_small_model(build_tiny("kimi_k25"), CPU), 0.5)
