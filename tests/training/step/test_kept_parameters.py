"""What transformers keeps in float32 beside bfloat16 is kept so here, and what is not is named."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megablocks_utils.fsdp.gradients import global_grad_norm, sum_replicated_gradients
from megablocks_utils.mesh.placement import is_replicated, mark_replicated
from megablocks_utils.training.model_source import build_bare_model
from megablocks_utils.training.step.kept_parameters import find_narrowed
from tests.support.tiny_families import build_tiny, save_tiny


@pytest.mark.parametrize("family", ["flint", "hunyuan_v1_moe", "deepseek_v4", "gpt_oss"])
def test_dtypes_are_those_of_from_pretrained(tmp_path, family):
    save_tiny(family, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = build_bare_model(tmp_path, torch.bfloat16, torch.bfloat16)
    wanted = {name: p.dtype for name, p in stock.named_parameters()}
    assert {name: p.dtype for name, p in ours.named_parameters()} == wanted
    kept = {name for name, dtype in wanted.items() if dtype == torch.float32}
    assert {name for name, p in ours.named_parameters() if is_replicated(p)} == kept
    assert find_narrowed(ours, torch.bfloat16) == []


def test_what_is_narrowed_is_named():
    model = build_tiny("flint")
    narrowed = find_narrowed(model, torch.bfloat16)
    assert {name.split(".", 3)[3] for name in narrowed} == {
        "mlp.gate.weight",
        "self_attn.sinks",
    }
    assert find_narrowed(model, torch.float32) == []


def _sum(rank):
    """Of three, one has gradients on both ranks, one on rank 1 only, one on none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for number, parameter in enumerate(parameters):
        mark_replicated(parameter)
        if number + 1 <= rank + 1 and number < 2:
            parameter.grad = torch.full((2,), 1.0 + rank)
    sum_replicated_gradients(parameters)
    norm = global_grad_norm(parameters).item()
    return [None if p.grad is None else p.grad.tolist() for p in parameters], norm


def test_gradients_are_summed_where_any_rank_has_one(ranks2):
    wanted = [[3.0, 3.0], [2.0, 2.0], None], pytest.approx(26**0.5)
    assert ranks2.run(_sum) == [wanted, wanted]
