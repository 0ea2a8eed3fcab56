"""With prefetch, a unit's weights are asked for before the exchange that the CPU waits in."""

from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from megablocks_utils.fsdp import fsdp2
from megablocks_utils.mesh import token_exchange
from megablocks_utils.training.data.batches import StepPlan
from megablocks_utils.training.loop import run_micro_batch
from megablocks_utils.training.step.micro_batch import LossWeights
from tests.support.parity import Layout, ParityCase, build_run

# Its shared experts come behind the experts: the way back computes a layer again from there, before
# it has come to the experts themselves.
CASE = ParityCase(Layout(4, 2), "deepseek_v3", num_steps=1, num_examples=4)
LAYERS = 4


def record_micro_step(rank: int, argv: list[str], prefetches: bool):
    """Take a micro-step; what was gathered and exchanged, in order, and the gradients' shards."""
    events: list[nn.Module | None] = []  # modules of weights that are gathered; None: an exchange
    gather, exchange = _fsdp_param_group.foreach_all_gather, token_exchange.exchange_rows

    def record_gather(params, *args):
        events.append(params[0]._module_info.module)
        return gather(params, *args)

    def record_exchange(*args):
        events.append(None)
        return exchange(*args)

    with (
        mock.patch.object(fsdp2, "prefetches_units", lambda *_: prefetches),
        mock.patch.object(_fsdp_param_group, "foreach_all_gather", record_gather),
        mock.patch.object(token_exchange, "exchange_rows", record_exchange),
    ):
        setup, state = build_run(argv)
        state.model.train()
        _, plan = next(setup.schedule.plans(0))
        assert isinstance(plan, StepPlan)
        events.clear()
        weights = LossWeights(plan.num_label_tokens, plan.num_real_micro_batches, 0.0)
        with state.accelerator.accumulate(state.model):
            loss = run_micro_batch(state, next(iter(plan.micro_batches)), weights)
    grads = [p.grad.to_local() for p in state.model.parameters() if p.grad is not None]
    names = {module: name for name, module in state.model.named_modules()}
    seen = [_unit_of(names[event]) if event is not None else "exchange" for event in events]
    return seen, loss.token_loss_sum.detach(), grads


def _unit_of(name: str) -> str:
    """Name the unit of a module: `layer 2`, `experts 2`, `head` (with the final norm)."""
    if ".layers." not in name:
        return "head" if name in ("lm_head", "model.norm") else name
    number = name.partition(".layers.")[2].partition(".")[0]
    return f"{'experts' if name.endswith('.experts') else 'layer'} {number}"


def test_the_next_unit_is_asked_for_before_the_exchange(pools, parity_folder):
    argv = parity_folder.argv(CASE)
    (events, loss, grads), *_ = pools[4].run(record_micro_step, argv, True)
    (plain, plain_loss, plain_grads), *_ = pools[4].run(record_micro_step, argv, False)
    assert torch.equal(loss, plain_loss)
    assert all(map(torch.equal, grads, plain_grads))
    # Each unit once in forward and once in backward, with and without; the head only once.
    assert sorted(events) == sorted(plain)
    gathered = [event for event in events if event.startswith(("layer", "experts"))]
    assert all(gathered.count(name) == 2 for name in gathered)
    middle = len(gathered) // 2
    forward = events[: _place(events, gathered[middle], 1)]
    backward = events[len(forward) :]
    for number in range(1, LAYERS):
        following = f"layer {number + 1}" if number + 1 < LAYERS else "head"
        assert following in _before_exchange(forward, f"experts {number}")
        assert following not in _before_exchange(plain, f"experts {number}")
        # Its rows have been sent again by then, with counts that are kept: the CPU waits for none.
        assert f"layer {number - 1}" in _before_exchange(backward, f"experts {number}", passed=2)


def _place(events: list[str], name: str, earlier: int) -> int:
    return [place for place, event in enumerate(events) if event == name][earlier]


def _before_exchange(events: list[str], name: str, passed: int = 0) -> list[str]:
    """Return what comes behind an event and before the next exchange, or that after some."""
    behind = events[events.index(name) :]
    return behind[: _place(behind, "exchange", passed)]
