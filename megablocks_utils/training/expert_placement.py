"""Place the experts of a run on its ranks by measured loads: `--expert_placement balanced`."""

from collections.abc import Mapping

from rich.console import Console

from megablocks_utils.config import RunConfig
from megablocks_utils.config.expert_balance import CONTIGUOUS, LayerBalance
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.mesh.device_mesh import EP_AXIS, axis_size
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import broadcast_from_rank0
from megablocks_utils.training.report.expert_load import read_measured_loads
from megablocks_utils.training.resume.resume_point import ResumePoint

__all__ = ["find_loads_path", "place_experts"]


def find_loads_path(config: RunConfig, resume: ResumePoint | None) -> str | None:
    """Return the loads that experts are placed by; None where they lie in the model's order.

    Raises:
        ConfigurationError: there are none: no file was given, nor has the checkpoint one.
    """
    parallel = config.parallel
    if parallel.expert_placement == CONTIGUOUS:
        return None
    if parallel.expert_loads is not None:
        return parallel.expert_loads
    if resume is not None and resume.loads_path is not None:
        return str(resume.loads_path)
    owner = "a run that starts fresh" if resume is None else f"the checkpoint {resume.folder}"
    raise ConfigurationError(
        f"expert_placement is {parallel.expert_placement}, but {owner} has no measured loads: give "
        "expert_loads, the expert_load.jsonl of a run with --expert_load_steps.",
        parameters=("expert_placement", "expert_loads"),
    )


def place_experts(sharded: ShardedMoE | None, path: str | None, console: Console) -> None:
    """Choose for each layer which rank of an ep group holds which experts, and say what it gives.

    Rank 0 reads the loads; all do as it says.

    **Collective:** where there is a path, a broadcast over the world; every rank must call.

    Args:
        sharded: its experts on meta, no adapters attached yet; None without expert parallelism.
        path: from `find_loads_path`.
        console: rank 0's; quiet elsewhere.

    Raises:
        ConfigurationError: on every rank, for loads that cannot be read or are of another model.
    """
    if path is None or sharded is None:
        return
    ep_size = axis_size(sharded.mesh, EP_AXIS)
    num_experts = {name: m.num_experts for name, m in sharded.expert_modules.items()}
    balances = broadcast_from_rank0(lambda: _balance(path, num_experts, ep_size))
    sharded.place_experts({name: balance.placed for name, balance in balances.items()})
    before, after = (
        sum(getattr(balance, when) for balance in balances.values()) * ep_size / len(balances)
        for when in ("before", "after")
    )
    console.print(
        f"experts placed by the loads in {path}: of an ep group's rows its busiest rank had "
        f"{before:.2f} times its fair share in the model's order, and has {after:.2f} times now "
        "(mean of layers and measured steps)",
        markup=False,
        soft_wrap=True,
    )


def _balance(path: str, num_experts: Mapping[str, int], ep_size: int) -> dict[str, LayerBalance]:
    loads = read_measured_loads(path, "expert_loads")
    loads.check(num_experts, "expert_loads")
    return {layer: loads.balance(layer, ep_size) for layer in num_experts}
