"""Bytes by link, against ranks put into nodes and counted one by one."""

import pytest

from megablocks_utils.planning.model.gpus import Gpu
from megablocks_utils.planning.speed.traffic_links import Cluster

GPU = Gpu("test", 1, 1.0, intra_bytes_per_s=90.0, inter_bytes_per_s=10.0)
SENT = 840.0


def groups_of(axis, world_size, ep_size):
    """The ranks of every group along an axis of the mesh ("dp", "ep"), ep innermost."""
    if axis == "world":
        return [list(range(world_size))]
    if axis == "ep":
        return [list(range(s, s + ep_size)) for s in range(0, world_size, ep_size)]
    return [list(range(first, world_size, ep_size)) for first in range(ep_size)]


def count(pairs, world_size, per_node):
    """Sum up (source, target, bytes) by link; return means a rank, and the busiest links' time."""
    intra, inter, sent_in, sent_out = 0.0, 0.0, [0.0] * world_size, [0.0] * world_size
    for source, target, amount in pairs:
        if source // per_node == target // per_node:
            intra, sent_in[source] = intra + amount, sent_in[source] + amount
        else:
            inter, sent_out[source] = inter + amount, sent_out[source] + amount
    return intra / world_size, inter / world_size, sent_in, sent_out


CASES = [
    # axis, world, ep, GPUs a node
    ("world", 8, 2, 8),  # one node
    ("world", 16, 2, 8),
    ("world", 64, 8, 8),
    ("dp", 16, 8, 8),  # each member in another node
    ("dp", 16, 4, 8),  # two members a node
    ("dp", 32, 2, 8),
    ("dp", 8, 2, 8),
    ("dp", 64, 16, 8),  # ep larger than a node
    ("world", 32, 2, 16),  # the adapters of a node are faster than the link to its neighbour
    ("ep", 16, 8, 8),
    ("ep", 16, 4, 8),
    ("ep", 32, 16, 8),
    ("ep", 64, 32, 4),
]


@pytest.mark.parametrize(("axis", "world_size", "ep_size", "per_node"), CASES)
def test_rings(axis, world_size, ep_size, per_node):
    groups = groups_of(axis, world_size, ep_size)
    pairs = [(a, b, SENT) for g in groups for a, b in zip(g, [*g[1:], g[0]], strict=True)]
    intra, inter, *_ = count(pairs, world_size, per_node)
    stride = {"world": 1, "ep": 1, "dp": ep_size}[axis]
    found = Cluster(GPU, per_node).ring(SENT, len(groups[0]), stride)
    assert (found.intra_bytes, found.inter_bytes) == pytest.approx((intra, inter))
    # A node's adapters share what crosses its border, whichever rank sends it.
    out_of_a_node = world_size * inter / (world_size // per_node)
    fast = SENT / 90 if intra else 0.0
    assert found.ideal_s == pytest.approx(max(fast, out_of_a_node / (per_node * 10)))


@pytest.mark.parametrize(("world_size", "ep_size", "per_node"), [c[1:] for c in CASES])
def test_all_to_all(world_size, ep_size, per_node):
    share = SENT / (ep_size - 1)
    groups = groups_of("ep", world_size, ep_size)
    pairs = [(a, b, share) for g in groups for a in g for b in g if a != b]
    intra, inter, sent_in, sent_out = count(pairs, world_size, per_node)
    found = Cluster(GPU, per_node).all_to_all(SENT, ep_size)
    assert (found.intra_bytes, found.inter_bytes) == pytest.approx((intra, inter))
    assert found.ideal_s == pytest.approx(max(max(sent_in) / 90, max(sent_out) / 10))


def test_one_rank_sends_nothing():
    found = Cluster(GPU, 8).all_to_all(0, 1)
    assert (found.intra_bytes, found.inter_bytes, found.ideal_s) == (0, 0, 0)
