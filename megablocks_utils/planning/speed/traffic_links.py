"""What a rank sends, by the link it goes over: within a node or between nodes.

The ranks form the mesh `("dp", "ep")`, ep innermost: neighbours share a node. Ranks that gather in
a ring send everything to one neighbour, so of a group with m members in each node only one in m
sends to another node, and its rings share the adapters of all m.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megablocks_utils.planning.memory.scenario import Scenario
from megablocks_utils.planning.model.gpus import Gpu
from megablocks_utils.planning.model.prediction import ParallelLayout, Prediction

__all__ = ["Cluster", "LinkTraffic", "add_traffic", "split_traffic"]


@dataclass(frozen=True)
class LinkTraffic:
    """What one rank sends, and how long its links are busy with it at full speed.

    Attributes:
        intra_bytes: to ranks of its node, mean over the ranks of a group.
        inter_bytes: to ranks of other nodes, likewise.
        ideal_s: the time it takes at the links' nominal speed.
    """

    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    ideal_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of one kind of GPU."""

    gpu: Gpu
    gpus_per_node: int

    def members_per_node(self, size: int, stride: int) -> int:
        """Return how many of a group's `size` ranks, `stride` apart, share a node."""
        return max(1, min(size, self.gpus_per_node // stride))

    def ring(self, sent: float, size: int, stride: int) -> LinkTraffic:
        """Cost an all-gather, reduce-scatter or all-reduce in which a rank sends `sent` bytes."""
        members = self.members_per_node(size, stride)
        if members == size:
            return LinkTraffic(intra_bytes=sent, ideal_s=sent / self.gpu.intra_bytes_per_s)
        slowest = members * self.gpu.inter_bytes_per_s
        if members > 1:
            slowest = min(slowest, self.gpu.intra_bytes_per_s)
        inter = sent / members
        return LinkTraffic(sent - inter, inter, sent / slowest)

    def all_to_all(self, sent: float, size: int) -> LinkTraffic:
        """Cost an all-to-all in which a rank sends `sent` bytes, the same to each of the others.

        Both kinds of link work at the same time.
        """
        members = self.members_per_node(size, 1)
        inter = sent * (size - members) / (size - 1) if size > 1 else 0.0
        intra = sent - inter
        seconds = (intra / self.gpu.intra_bytes_per_s, inter / self.gpu.inter_bytes_per_s)
        return LinkTraffic(intra, inter, max(seconds))


def split_traffic(
    scenario: Scenario, layout: ParallelLayout, prediction: Prediction, cluster: Cluster
) -> Mapping[str, LinkTraffic]:
    """Return the traffic of one optimizer step by kind of collective, over its links.

    What is gathered over dp is the difference to the same layout with copies, which are not
    gathered at all; the rest is gathered over all ranks of a group.
    """
    shard_size, sent = scenario.shard_size, prediction.sent_bytes_per_step
    dp_size, over_group = shard_size // layout.ep_size, sent
    if layout.ep_size > 1 and dp_size > 1 and layout.expert_dp == "shard":
        copies = ParallelLayout(layout.ep_size, "replicate")
        over_group = scenario.one_group().predict(copies).sent_bytes_per_step
    sp_size, heads = scenario.config.parallel.sp_size, 0
    if sp_size > 1:
        # Without expert parallelism nothing else is exchanged.
        heads = scenario.predict(ParallelLayout(1, "shard")).sent_bytes_per_step["all_to_all"]
    traffic = {
        "all_to_all": add_traffic(
            cluster.all_to_all(sent["all_to_all"] - heads, layout.ep_size),
            cluster.all_to_all(heads, sp_size),
        )
    }
    for name in ("all_gather", "reduce_scatter"):
        on_all = min(over_group[name], sent[name])
        traffic[name] = add_traffic(
            cluster.ring(on_all, shard_size, 1),
            cluster.ring(sent[name] - on_all, dp_size, layout.ep_size),
        )
    on_all, over_dp, across = _split_all_reduce(scenario, layout, sent["all_reduce"])
    traffic["all_reduce"] = add_traffic(
        cluster.ring(on_all, scenario.world_size, 1),
        cluster.ring(over_dp, dp_size, layout.ep_size),
        cluster.ring(across, scenario.world_size // shard_size, shard_size),
    )
    return traffic


def _split_all_reduce(
    scenario: Scenario, layout: ParallelLayout, sent: int
) -> tuple[int, int, int]:
    """Split what is all-reduced: over all ranks, over dp (copies), from group to group.

    Over all ranks goes what is left without groups and copies; FSDP1 knows nothing but copies.
    """
    has_copies = layout.expert_dp == "replicate" and layout.ep_size < scenario.shard_size
    if scenario.config.entry_point == "fsdp1":
        return (0, sent, 0) if has_copies else (sent, 0, 0)
    if not has_copies and scenario.shard_size == scenario.world_size:
        return sent, 0, 0
    whole, over_dp = replace(layout, expert_dp="shard"), 0
    on_all = scenario.with_groups(1).predict(whole).sent_bytes_per_step["all_reduce"]
    if scenario.shard_size == scenario.world_size:
        return on_all, sent - on_all, 0
    if has_copies:
        group = scenario.one_group()
        with_copies, without = (group.predict(own).sent_bytes_per_step for own in (layout, whole))
        over_dp = with_copies["all_reduce"] - without["all_reduce"]
    return on_all, over_dp, sent - on_all - over_dp


def add_traffic(*parts: LinkTraffic) -> LinkTraffic:
    """Return traffic that goes one after the other."""
    return LinkTraffic(
        sum(part.intra_bytes for part in parts),
        sum(part.inter_bytes for part in parts),
        sum(part.ideal_s for part in parts),
    )
