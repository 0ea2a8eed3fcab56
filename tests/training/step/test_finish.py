"""The end of a step, the same for both scripts: gradients summed over replicas, update, checks."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.shard_moe_utils import shard_moe
from megablocks_utils.training.step.finish import StepFinish
from tests.support.tiny_models import build_tiny_model


def _finish_two_steps(rank):
    """Two replicas of all experts; rank r's gradients are r + 1 in the first step."""
    sharded = shard_moe(build_tiny_model("mixtral"), ep_size=1, expert_dp="replicate")
    parameters = list(sharded.expert_parameters.values())
    before = local_tensor(parameters[0].detach()).clone()
    optimizer = SGD(parameters, lr=0.5)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 - 0.1 * step)
    finish = StepFinish(sharded.model, sharded, max_grad_norm=0.0, is_debug_run=True)

    for parameter in parameters:
        parameter.grad = torch.full_like(parameter.detach(), 1.0 + rank)
    finish.finish_gradients()
    rate = finish.update(optimizer, scheduler)
    finish.check_weights(step=1)
    moved = before - local_tensor(parameters[0].detach())
    is_cleared = all(parameter.grad is None for parameter in parameters)

    if rank:
        local_tensor(parameters[0].detach()).view(-1)[0] += 1.0
    with pytest.raises(RuntimeError, match="^after step 2 the copies of "):
        finish.check_weights(step=2)
    quiet = StepFinish(sharded.model, sharded, max_grad_norm=0.0)
    quiet.check_weights(step=2)
    return rate, moved.mean().item(), is_cleared, scheduler.get_last_lr()


def test_replicas_move_together_and_a_debug_run_checks_them(ranks2):
    answers = ranks2.run(_finish_two_steps)
    for rate, moved, is_cleared, next_rates in answers:
        assert rate == 0.5 and is_cleared
        assert moved == pytest.approx(0.5 * (1 + 2), rel=1e-5)
        assert next_rates == [0.45]
