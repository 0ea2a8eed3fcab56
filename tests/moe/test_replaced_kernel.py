"""A kernel that `auto` has selected and that fails its check makes room for another."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.kernels.probing.probe import Deviation
from megablocks_utils.kernels.selection.backend_selection import LoadedBackend
from megablocks_utils.moe import kernel_check
from megablocks_utils.moe.sharded_moe import ShardedMoE
from tests.kernels.facts import run_nothing


class _Experts(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.spec, self.backend = SimpleNamespace(kind=kind), None
        self.weight_format = None
        self.down_proj = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))


def shard(alternative: str | None) -> ShardedMoE:
    """Return experts of two layers that differ, as `shard_moe` leaves them."""
    modules = {kind: _Experts(kind) for kind in ("first", "second")}
    kernel = LoadedBackend("grouped_mm", "auto: why", run_nothing, alternative)
    return ShardedMoE(nn.Module(), None, modules, "shard", kernel)


@pytest.fixture
def probed(monkeypatch):
    """Backends that the second layer was probed with; what one of them raises can be changed."""
    seen = SimpleNamespace(
        names=[], error=ConfigurationError("kernel grouped_mm fails; use eager.")
    )

    def probe(name, module, dtype):
        if module.spec.kind == "second":
            seen.names.append(name)
            if name == "grouped_mm":
                raise seen.error
        return Deviation("output", 1.0, 2.0)

    monkeypatch.setattr(kernel_check, "_probe", probe)
    return seen


def test_another_takes_the_place_of_one_that_fails(probed):
    sharded = shard("triton")
    check = kernel_check.verify_kernel(sharded)
    assert probed.names == ["grouped_mm", "triton"]
    kernel = sharded.kernel
    assert (kernel.name, kernel.reason) == ("triton", "auto: grouped_mm failed its check")
    assert [m.backend for m in sharded.expert_modules.values()] == [kernel.run] * 2
    assert check.replaced == "kernel grouped_mm fails; the experts run on triton instead."
    assert (check.worst, check.skipped) == (0.5, None)


@pytest.mark.parametrize("error", [None, CheckpointError("weights that are not finite.")])
def test_nothing_does_where_there_is_none_or_the_weights_are_at_fault(probed, error):
    probed.error = error or probed.error
    sharded = shard(None if error is None else "triton")
    with pytest.raises(type(probed.error)):
        kernel_check.verify_kernel(sharded)
    assert probed.names == ["grouped_mm"] and sharded.kernel.name == "grouped_mm"
