"""Gather the next unit's weights before a layer's exchange of tokens makes the CPU wait.

FSDP2 gathers a unit when the CPU comes to its forward pass. With expert parallelism the CPU waits
in every layer for the device, to read how many rows will come; what it has not asked for by then is
asked for too late. So each unit's forward pass first asks for the next unit's weights: a layer's
for those of its experts (where FSDP has them), the experts' for the next layer's. The backward
pass is left as it is: FSDP2 asks ahead by itself, in the reverse of the order that it has recorded,
and the CPU waits for no counts there.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.sharded_moe import ShardedMoE

__all__ = ["prefetch_in_order"]


def prefetch_in_order(sharded: ShardedMoE, layers: Sequence[nn.Module]) -> None:
    """Let units ask for each other's weights; one more of them is gathered at a time.

    Args:
        sharded: the model, wrapped by FSDP2.
        layers: its layers. Those in one `nn.ModuleList` are called one after the other; nothing is
            known of what comes between two lists (layers for images are in one of their own), but
            that the output head comes after the layers with experts.
    """
    for chain in _chains(sharded.model, layers):
        for unit, following in pairwise(chain):
            assert isinstance(following, FSDPModule)
            unit.register_forward_pre_hook(_ask_for(following), prepend=True)


def _ask_for(following: FSDPModule) -> Callable[[Any, Any], None]:
    def ask(unit: FSDPModule, _inputs: Any) -> None:
        # Checkpointing repeats a forward pass within the backward pass: the next layer is done.
        is_repeated = torch._C._current_graph_task_id() != -1
        unit.set_modules_to_forward_prefetch([] if is_repeated else [following])

    return ask


def _chains(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield units in the order of their forward passes, a list for each list of layers."""
    wanted, head = set(layers), getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or wanted.isdisjoint(module):
            continue
        parts = list(module.modules())
        chain: list[nn.Module] = [part for part in parts if isinstance(part, FSDPModule)]
        has_experts = any(isinstance(part, DroplessExperts) for part in parts)
        if has_experts and isinstance(head, nn.Module) and isinstance(head, FSDPModule):
            chain.append(head)
        yield chain
