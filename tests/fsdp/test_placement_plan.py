"""Every parameter lies as the placement plan declares; each kind of deviation ends all ranks."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from megablocks_utils.config import RunConfig, resolve_precision
from megablocks_utils.errors import PlacementError
from megablocks_utils.fsdp import fsdp1
from megablocks_utils.fsdp.placement_check import verify_placements
from megablocks_utils.fsdp.placement_plan import build_placement_plan, describe_plan
from megablocks_utils.mesh.placement import local_tensor, mark_replicated
from tests.support.parity import Layout, ParityCase, ParityFolder, build_run

LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.down_proj"
ROUTER = f"{LAYER}.mlp.gate.weight"
EXPERTS = "model.layers.*.mlp.experts.down_proj"
DENSE = "dp: shard, ep: shard (dense parameters)"


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = ParityFolder(tmp_path_factory.mktemp("placement"))
    case = ParityCase(Layout(4, 2, "replicate"), num_steps=1, num_examples=20)
    return folder.argv(case)


def _put(model, name, tensor):
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))


def _plant(rank, argv, names):
    """Plant each deviation in a run that is ready to train; returns what the check then says."""
    setup, state = build_run(argv)
    plan, model = setup.placement, state.model
    first = plan.entries[0]
    expert, router = model.get_parameter(EXPERT), model.get_parameter(ROUTER)
    mesh = setup.sharded.mesh
    own = local_tensor(expert.detach())
    plants = {
        "extra": lambda: rank == 3 and _put(model, "model.extra", torch.ones(3)),
        "lost": lambda: delattr(model.get_submodule(f"{LAYER}.mlp.gate"), "weight"),
        "whole": lambda: _put(model, ROUTER, router.detach().full_tensor()),
        "axis": lambda: _put(model, EXPERT, DTensor.from_local(own, mesh["dp"], [Shard(0)])),
        "dim": lambda: _put(model, EXPERT, DTensor.from_local(own, mesh["ep"], [Shard(1)])),
        "short": lambda: _put(
            model,
            EXPERT,
            DTensor.from_local(
                own[rank % 2 :], mesh["ep"], [Shard(0)], shape=expert.shape, stride=expert.stride()
            ),
        ),
    }
    plans = {
        "twice": [*plan.entries, replace(first, pattern=ROUTER)],
        "empty": [*plan.entries, replace(first, pattern="model.absent")],
    }
    said = {}
    for name in names:
        if name in plants:
            plants[name]()
        entries = tuple(plans.get(name, plan.entries))
        with pytest.raises(PlacementError) as report:
            verify_placements(model, replace(plan, entries=entries))
        said[name] = str(report.value)
        if rank == 3 and name == "extra":
            del model.model.extra
        model.get_submodule(f"{LAYER}.mlp.gate").weight = router
        model.get_submodule(f"{LAYER}.mlp.experts").down_proj = expert
        verify_placements(model, plan)
    return said, list(describe_plan(plan))


def test_each_deviation_ends_all_ranks_with_a_sentence(ranks4, argv):
    says = "but the placement plan says"
    wanted = {
        "extra": "model.extra is in no entry of the placement plan, but it must be in exactly one.",
        "twice": f"{ROUTER} is in 2 entries of the placement plan, {ROUTER} (dense parameters) and "
        "model.layers.*.mlp.gate.weight (dense parameters), but it must be in exactly one.",
        "empty": "the placement plan declares 1 of model.absent (dense parameters), but "
        "the wrapped model has 0.",
        "lost": "the placement plan declares 2 of model.layers.*.mlp.gate.weight (dense "
        "parameters), but the wrapped model has 1.",
        "whole": f"{ROUTER} is whole on every rank, {says} {DENSE}.",
        "axis": f"{EXPERT} is dp: shard of dim 0, ep: copies, {says} dp: copies, ep: shard of dim "
        "0 (experts).",
        "dim": f"{EXPERT} is dp: copies, ep: shard of dim 1, {says} dp: copies, ep: shard of dim 0 "
        "(experts).",
        "short": f"the ranks together hold 86,016 elements of {EXPERTS}, {says} 98,304 (experts).",
    }
    answers = ranks4.run(_plant, argv, list(wanted))
    assert all(said == wanted for said, _ in answers)
    table = answers[0][1]
    row = table.index(f"  2 x {EXPERTS}, 49,152 elements")
    kind = next(line for line in table[row::-1] if not line.startswith(" "))
    assert kind.startswith("experts on dp: copies, ep: shard of dim 0 (")


def _wrap_and_leave_one_out(rank):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    mark_replicated(model[2].bias)
    plan = build_placement_plan(model, None)
    plugin = fsdp1.build_fsdp1_plugin(resolve_precision(RunConfig(), "cpu"))
    real = fsdp1.FullyShardedDataParallel

    def wrap(left_out):
        def wrap_all_but(module, *, ignored_states, **kwargs):
            ignored = [*ignored_states, *(module.get_parameter(name) for name in left_out)]
            return real(module, ignored_states=ignored, **kwargs)

        with mock.patch.object(fsdp1, "FullyShardedDataParallel", wrap_all_but):
            return fsdp1.wrap_fsdp1(
                model,
                None,
                plugin,
                layer_classes=[],
                device=torch.device("cpu"),
                fill_local=pytest.fail,
            )

    with pytest.raises(PlacementError) as report:
        verify_placements(wrap(["1.bias"]), plan)
    return str(report.value), [entry.pattern for entry in plan.entries]


def test_what_fsdp1_leaves_whole_ends_the_run(ranks2):
    """And layers that differ in kind are declared by name, each of them."""
    for said, patterns in ranks2.run(_wrap_and_leave_one_out):
        assert said == (
            "1.bias is whole on every rank, but the placement plan says dp: shard (dense "
            "parameters)."
        )
        assert patterns == ["*.weight", "0.bias", "1.bias", "2.bias"]
