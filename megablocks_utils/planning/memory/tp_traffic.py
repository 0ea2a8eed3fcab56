"""Bytes that a rank sends by the collectives of tensor parallelism; what an axis of a mesh is."""

from collections.abc import Iterator
from dataclasses import dataclass

from megablocks_utils.planning.memory.sizes import FP32, Sizes
from megablocks_utils.planning.model.parameter_shapes import LayerShape
from megablocks_utils.planning.model.prediction import GroupTraffic

__all__ = ["Axis", "count_tp_traffic"]


@dataclass(frozen=True)
class Axis:
    """Ranks of a group, so far from each other."""

    size: int
    stride: int

    def send(self, kind: str, num_bytes: int) -> GroupTraffic:
        """Say that a rank sends so much."""
        return GroupTraffic(kind, self.size, self.stride, num_bytes)

    def reduce(self, num_bytes: int) -> GroupTraffic:
        """Say that tensors of so much are all-reduced."""
        return self.send("all_reduce", num_bytes * 2 * (self.size - 1) // self.size)


def count_tp_traffic(sizes: Sizes, tp: Axis) -> Iterator[GroupTraffic]:
    """Yield what the ranks send each other that have the same rows; see `fsdp.tensor_parallel`."""
    if tp.size == 1:
        return
    steps, others = sizes.run.accumulation, tp.size - 1
    yield tp.send("all_gather", steps * others * _count_gathered(sizes))
    head = sizes.shape.vocab_size * sizes.shape.hidden_size * sizes.compute // tp.size
    yield tp.send("reduce_scatter", steps * others * head * sizes.trains_all)
    reduced = sum(_count_reduced(sizes, layer) for layer in sizes.shape.layers)
    # No gradient of the first layer's inputs.
    reduced -= 3 * sizes.hidden_bytes * sizes.first_inputs_are_frozen
    yield tp.reduce(steps * (reduced + FP32))  # with the loss


def _count_gathered(sizes: Sizes) -> int:
    """Gather the embedding, results of experts, the head's weights; backward what was taken."""
    shape, run, tp_size = sizes.shape, sizes.run, sizes.run.tp_size
    width = FP32 if shape.routes_in_fp32 else sizes.compute
    taken = sizes.expert_hidden_bytes + sizes.num_routed * width
    num_taken = shape.num_moe_layers - sizes.first_experts_send_nothing_back
    # Computing again ends with the last result that is needed: before that, but for what follows.
    again = run.gradient_checkpointing != "none"
    num_joined = sum(1 + (again and layer.mlp_size > 0) for layer in shape.layers if layer.is_moe)
    joined = num_joined * sizes.expert_hidden_bytes
    head = shape.vocab_size * shape.hidden_size * sizes.compute // tp_size
    rows = -(-run.label_tokens // tp_size) * shape.hidden_size * sizes.compute
    return sizes.hidden_bytes // tp_size + num_taken * taken + joined + head + rows


def _count_reduced(sizes: Sizes, layer: LayerShape) -> int:
    """Reduce outputs of layers split by rows, and gradients of inputs of those split by columns."""
    run = sizes.run
    low_rank = sizes.tokens * run.lora_r * sizes.compute
    num_forward = 1 + (run.gradient_checkpointing != "none")
    # Queries, keys and values backward, the output forward.
    adapted = low_rank * run.trains_attention
    reduced = (3 + num_forward) * (sizes.hidden_bytes + adapted)
    if sizes.attention.qk_norm == "head":
        reduced += 2 * sizes.attention.head_dim * sizes.compute * sizes.trains_all
    if layer.mlp_size:
        # The output of the layer's end is computed again for adapters alone.
        num_forward = num_forward if run.trains_dense else 1
        reduced += (2 + num_forward) * (sizes.hidden_bytes + low_rank * run.trains_dense)
    return reduced
