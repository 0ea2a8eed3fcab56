"""The checks of a `--debug` run find what they are for."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.tensor_parallel import _build_token_split
from megablocks_utils.mesh.dense_mesh import DENSE_DP_AXIS, TP_AXIS, build_dense_mesh
from megablocks_utils.shard_moe_utils import shard_moe
from megablocks_utils.training.step.debug import (
    check_gradients_beside_tp,
    check_replicas,
    describe_placements,
)
from tests.support.tiny_models import build_tiny_model


def _sharded(dtype=torch.float32):
    return shard_moe(build_tiny_model("mixtral").to(dtype), ep_size=2, expert_dp="replicate")


def _check_one_bit(rank, dtype):
    """Equal copies pass; then the last bit of one weight of one copy of experts 2-3 flips."""
    sharded = _sharded(dtype)
    check_replicas(sharded.model, sharded, step=1)
    name, parameter = list(sharded.expert_parameters.items())[-1]
    if rank == 3:
        bits = parameter.detach().to_local().view(torch.int16)
        bits[0, 0, 0] ^= 1
    with pytest.raises(RuntimeError) as report:
        check_replicas(sharded.model, sharded, step=2)
    return str(report.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_replicas_sees_one_bit_on_every_rank(ranks4, dtype):
    """Maxima are taken, so only the rank below them sees the difference; all must stop."""
    reports = ranks4.run(_check_one_bit, dtype)
    start = "after step 2 the copies of "
    assert all(report.startswith(start) for report in reports)
    named = [report for report in reports if "model.layers.1.mlp.experts.down_proj" in report]
    assert len(named) == 1


def _describe(rank):
    return list(describe_placements(_sharded().model))


def test_describe_placements(ranks4):
    lines = ranks4.run(_describe)[0]
    prefix = "model.layers.0.mlp"
    assert f"{prefix}.gate.weight (4, 64) on plain tensor, 1,024 bytes here" in lines
    where = "on ep: Shard(dim=0), 49,152 bytes here"
    assert f"{prefix}.experts.down_proj (4, 64, 96) {where}" in lines


def _check_gradients(rank, factor):
    """Two parameters that both ranks of a tp group hold; the second's gradients differ."""
    mesh = build_dense_mesh("cpu", tp_size=2)
    experts = SimpleNamespace(token_split=_build_token_split(mesh[TP_AXIS]))
    model = nn.Linear(4, 4)
    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        whole = distribute_tensor(parameter.detach(), mesh[DENSE_DP_AXIS], [Replicate()])
        setattr(model, name, nn.Parameter(whole))
        gradient = torch.ones(parameter.shape) * (factor if rank and number else 1.0)
        getattr(model, name).grad = distribute_tensor(gradient, mesh[DENSE_DP_AXIS], [Replicate()])
    try:
        check_gradients_beside_tp(model, SimpleNamespace(expert_modules={"experts": experts}))
    except ConfigurationError as error:
        return str(error)
    return "equal"


def test_gradients_of_what_tp_leaves_whole_are_compared(ranks2):
    assert ranks2.run(_check_gradients, 1.001) == ["equal"] * 2
    for sentence in ranks2.run(_check_gradients, 1.2):
        assert sentence.startswith("tp_size is 2, but it must be 1 for this model: its ranks have")
        assert "different gradients of bias (1 parameters in all)" in sentence
