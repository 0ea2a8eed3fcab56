"""Fine-tune Mixture-of-Experts language models with expert parallelism."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megablocks_utils.shard_moe_utils import ShardedMoE, shard_moe

__all__ = ["ShardedMoE", "shard_moe"]


def __getattr__(name: str) -> Any:
    """Import torch and the sharding code only when they are asked for.

    So the options can be checked, and `--help` answered, without torch.
    """
    if name in __all__:
        from megablocks_utils import shard_moe_utils

        return getattr(shard_moe_utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
