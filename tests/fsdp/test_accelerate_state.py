"""FSDP on a CPU: the workaround works, and Accelerate still needs it."""

import pytest
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

from megablocks_utils.fsdp.accelerate_state import assert_fsdp_is_on, turn_fsdp_on


def _build(rank):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    before = accelerator.distributed_type
    with pytest.raises(RuntimeError, match="^Accelerate runs MULTI_CPU instead of FSDP"):
        assert_fsdp_is_on(accelerator)
    turn_fsdp_on(accelerator, plugin)
    assert_fsdp_is_on(accelerator)
    return before, Accelerator().distributed_type, accelerator.is_fsdp2, str(accelerator.device)


def test_accelerate_leaves_fsdp_off_on_cpu_until_it_is_turned_on(ranks2):
    """If the first value becomes FSDP, Accelerate has fixed its list: remove the workaround."""
    wanted = (DistributedType.MULTI_CPU, DistributedType.FSDP, True, "cpu")
    assert ranks2.run(_build) == [wanted, wanted]
