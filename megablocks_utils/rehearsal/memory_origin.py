"""Find out from the call stack what a new piece of memory is for."""

import sys
from functools import cache
from types import FrameType

import torch

__all__ = ["FSDP_BUFFERS", "find_origin"]

ACTIVATIONS, DISPATCH_BUFFERS, FSDP_BUFFERS = "activations", "dispatch_buffers", "fsdp_buffers"
_ELSEWHERE, _ENGINE, _NOTHING = "elsewhere", "autograd engine", "nothing"

# The innermost frame whose file is in one of these places decides.
_PLACES = (
    # DTensor works out placements on fakes of the whole tensor: no memory of any real run.
    ("/torch/distributed/tensor/_sharding_prop", _NOTHING),
    ("/torch/distributed/fsdp/", FSDP_BUFFERS),
    ("/megablocks_utils/fsdp/cpu_offload", "optimizer"),
    ("/torch/optim/", "optimizer"),
    ("/megablocks_utils/training/step/stochastic_rounding", "optimizer"),
    ("/megablocks_utils/fsdp/materialize", "parameters"),
    ("/megablocks_utils/kernels/", DISPATCH_BUFFERS),
    ("/megablocks_utils/moe/", DISPATCH_BUFFERS),
    ("/megablocks_utils/mesh/peer_exchange", DISPATCH_BUFFERS),
    ("/megablocks_utils/mesh/token_exchange", DISPATCH_BUFFERS),
    ("/transformers/integrations/moe", DISPATCH_BUFFERS),
    ("/transformers/models/", ACTIVATIONS),
    ("/torch/autograd/graph", _ENGINE),
)
# Of backward functions that are not Python, only the experts' matrix products are told apart.
_EXPERT_NODES = ("GroupedMm",)


def find_origin() -> str | None:
    """Return the component of what is being allocated now; None if no real run allocates it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = _find_place(frame.f_code.co_filename)
        if place == _NOTHING:
            return None
        if place == _ENGINE:
            return _origin_of_node()
        if place != _ELSEWHERE:
            return place
        frame = frame.f_back
    return ACTIVATIONS


def _origin_of_node() -> str:
    node = torch._C._current_autograd_node()
    is_expert = node is not None and node.name().startswith(_EXPERT_NODES)
    return DISPATCH_BUFFERS if is_expert else ACTIVATIONS


@cache
def _find_place(filename: str) -> str:
    normal = filename.replace("\\", "/")
    return next((place for part, place in _PLACES if part in normal), _ELSEWHERE)
