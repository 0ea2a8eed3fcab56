"""Fine-tune Mixture-of-Experts language models with expert parallelism."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megablocks_utils.ep_implementation import register_ep_implementation
    from megablocks_utils.experts_interface import register_experts_implementation
    from megablocks_utils.moe.kernel_check import verify_kernel
    from megablocks_utils.moe.sharded_moe import ShardedMoE
    from megablocks_utils.shard_moe_utils import shard_moe

__all__ = [
    "ShardedMoE",
    "register_ep_implementation",
    "register_experts_implementation",
    "shard_moe",
    "verify_kernel",
]

_HOMES = {
    "ShardedMoE": "moe.sharded_moe",
    "register_ep_implementation": "ep_implementation",
    "register_experts_implementation": "experts_interface",
    "shard_moe": "shard_moe_utils",
    "verify_kernel": "moe.kernel_check",
}


def __getattr__(name: str) -> Any:
    """Import torch and the code behind a name only when it is asked for.

    So the options can be checked, and `--help` answered, without torch.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
