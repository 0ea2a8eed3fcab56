"""Use a model between two steps and leave no trace of it in training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients; on leaving, all is as it was before.

    That is every module's mode, the random states of Python, numpy and torch, and the shards of
    FSDP: the weights of the outermost unit would stay gathered until the next backward pass.

    Args:
        model: wrapped by FSDP1 or FSDP2, or not at all.
    """
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        _free_gathered(model)


def _free_gathered(model: nn.Module) -> None:
    # Where torch has it: FSDP2 also forgets the order of passes that no backward pass follows.
    if isinstance(model, FSDPModule) and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle if module._is_root else None
            if handle is not None:  # it has weights of its own
                _reshard(module, handle, free_unsharded_flat_param=True)
