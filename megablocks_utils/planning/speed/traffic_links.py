"""What a rank sends, by the link it goes over: within a node or between nodes.

A group along an axis of the mesh is so many ranks, so far from each other: neighbours share a node.
Ranks that gather in a ring send everything to one neighbour, so of a group with m members in each
node only one in m sends to another node, and its rings share the adapters of all m.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megablocks_utils.planning.model.gpus import Gpu
from megablocks_utils.planning.model.prediction import COLLECTIVES, Prediction

__all__ = ["Cluster", "LinkTraffic", "split_traffic"]


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

    def all_to_all(self, sent: float, size: int, stride: int = 1) -> LinkTraffic:
        """Cost an all-to-all in which a rank sends `sent` bytes, the same to each of the others.

        Both kinds of link work at the same time.
        """
        members = self.members_per_node(size, stride)
        inter = sent * (size - members) / (size - 1) if size > 1 else 0.0
        intra = sent - inter
        seconds = (intra / self.gpu.intra_bytes_per_s, inter / self.gpu.inter_bytes_per_s)
        return LinkTraffic(intra, inter, max(seconds))


def split_traffic(prediction: Prediction, cluster: Cluster) -> Mapping[str, LinkTraffic]:
    """Return the traffic of one optimizer step by kind of collective, over its links."""
    traffic = dict.fromkeys(COLLECTIVES, LinkTraffic())
    for kind, size, stride, sent in prediction.sent:
        cost = cluster.all_to_all if kind == "all_to_all" else cluster.ring
        traffic[kind] = _add(traffic[kind], cost(sent, size, stride))
    return traffic


def _add(*parts: LinkTraffic) -> LinkTraffic:
    """Return traffic that goes one after the other."""
    return LinkTraffic(
        sum(part.intra_bytes for part in parts),
        sum(part.inter_bytes for part in parts),
        sum(part.ideal_s for part in parts),
    )
