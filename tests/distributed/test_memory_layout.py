"""Who holds what of a run under FSDP2, counted from the DTensors on every rank."""

from functools import cache

import pytest
from torch.distributed.tensor import DTensor, Replicate

from tests.support.parity import Layout, ParityCase, build_run

WORLD_SIZE = 4
NUM_LAYERS = 2
HIDDEN, INTERMEDIATE = 64, 96


def describe_parameters(rank, argv):
    """Return of each parameter: mesh axes with their placements, local and whole bytes."""
    setup, state = build_run(argv)
    described = {}
    for name, parameter in state.model.named_parameters():
        assert isinstance(parameter, DTensor), name
        axes = parameter.device_mesh.mesh_dim_names or ("world",)
        local = parameter.to_local()
        described[name] = {
            "placements": dict(zip(axes, map(_plain, parameter.placements), strict=True)),
            "local_bytes": local.untyped_storage().nbytes(),
            "local_shape": tuple(local.shape),
            "bytes": parameter.numel() * parameter.element_size(),
        }
    return set(setup.sharded.expert_parameters), described


def _plain(placement):
    """Name a placement; the strided shards of a tensor sharded twice are shards too."""
    if isinstance(placement, Replicate):
        return "replicated"
    return f"shard {placement.dim}" if hasattr(placement, "dim") else str(placement)


@pytest.fixture(scope="module")
def describe(ranks4, parity_folder):
    """The parameters of every rank in a layout with some options, each built once."""

    @cache
    def build_once(layout, model="mixtral", **options):
        case = ParityCase(layout, model, num_steps=1, **options)
        return ranks4.run(describe_parameters, parity_folder.argv(case))

    return build_once


@pytest.mark.parametrize(
    ("layout", "share"),
    [
        (Layout(4, 1, "shard"), 1 / 4),
        (Layout(4, 2, "shard"), 1 / 4),
        (Layout(4, 4, "shard"), 1 / 4),
        (Layout(4, 1, "replicate"), 1),
        (Layout(4, 2, "replicate"), 1 / 2),
        (Layout(4, 4, "replicate"), 1 / 4),
    ],
    ids=str,
)
def test_rank_holds_its_share_of_the_experts(describe, layout, share):
    num_experts = 4
    whole = NUM_LAYERS * num_experts * 3 * HIDDEN * INTERMEDIATE * 4
    for experts, described in describe(layout):
        assert sum(described[name]["bytes"] for name in experts) == whole
        assert sum(described[name]["local_bytes"] for name in experts) == whole * share


@pytest.mark.parametrize(
    ("layout", "model", "placements", "local_experts"),
    [
        (Layout(4, 1), "mixtral", {"dp": "shard 0", "ep": "shard 0"}, 1),
        (Layout(4, 2), "mixtral", {"dp": "shard 0", "ep": "shard 0"}, 1),
        (Layout(4, 4), "mixtral", {"ep": "shard 0"}, 1),
        (Layout(4, 2, "replicate"), "mixtral", {"ep": "shard 0"}, 2),
        (Layout(4, 2), "olmoe, 2 experts", {"dp": "shard 1", "ep": "shard 0"}, 1),
    ],
    ids=str,
)
def test_exactly_the_experts_are_split_over_ep(describe, layout, model, placements, local_experts):
    for experts, described in describe(layout, model):
        assert len(experts) == 2 * NUM_LAYERS
        for name in experts:
            assert described[name]["placements"] == placements
            assert described[name]["local_shape"][0] == local_experts
        split_over_ep = {n for n, d in described.items() if "ep" in d["placements"]}
        assert split_over_ep == experts
        others = [d for name, d in described.items() if name not in experts]
        assert all(list(d["placements"].values()) == ["shard 0"] for d in others)


def test_adapters_are_sharded_like_everything_else(describe):
    for experts, described in describe(Layout(4, 2), lora="all", lora_rank=4):
        adapters = {n: d for n, d in described.items() if "lora_" in n and "self_attn" in n}
        assert len(adapters) == NUM_LAYERS * 4 * 2
        assert not experts & set(adapters)
        for d in adapters.values():
            assert list(d["placements"].values()) == ["shard 0"]
            assert "ep" not in d["placements"]
            assert d["local_bytes"] * WORLD_SIZE == d["bytes"]


@pytest.mark.parametrize(
    ("layout", "model", "rank", "placements", "num_held"),
    [
        (Layout(4, 4), "mixtral", 3, {"ep": "shard 0"}, 1),
        (Layout(4, 2), "mixtral", 4, {"dp": "shard 0", "ep": "shard 0"}, 1),
        (Layout(4, 2, "replicate"), "mixtral", 3, {"ep": "shard 0"}, 2),
        # One expert and a rank of 1: A has nothing to split over dp but its columns.
        (Layout(4, 2), "olmoe, 2 experts", 1, {"dp": "shard 2", "ep": "shard 0"}, 1 / 2),
    ],
    ids=str,
)
def test_adapters_of_experts_lie_with_their_experts(
    describe, layout, model, rank, placements, num_held
):
    """`num_held`: experts whose adapters a rank holds, or the share of one."""
    for experts, described in describe(layout, model, lora="all", lora_rank=rank):
        adapters = {n: d for n, d in described.items() if "lora_" in n and "self_attn" not in n}
        assert len(adapters) == NUM_LAYERS * 2 * 2
        assert set(adapters) <= experts
        for name, d in adapters.items():
            num_experts = 2 if "2 experts" in model else 4
            assert d["local_bytes"] == d["bytes"] * num_held / num_experts, name
            if "lora_A" in name:
                assert d["placements"] == placements
