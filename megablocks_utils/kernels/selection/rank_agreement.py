"""One selection of the experts' backend for all ranks."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.device import read_device_facts
from megablocks_utils.kernels.gate import build_gate
from megablocks_utils.kernels.selection.backend_selection import (
    LoadedBackend,
    load_backend,
    select_backend,
)
from megablocks_utils.kernels.shapes import EXPERT_MODES, ExpertShapes, ExpertsModule
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks

__all__ = ["ExpertUse", "select_for_all_ranks"]


class ModelWithConfig(Protocol):
    """A transformers model; what is in its config depends on the family."""

    @property
    def config(self) -> Any:
        """What `config.json` holds."""


@dataclass(frozen=True)
class ExpertUse:
    """What the caller of `shard_moe` knows of how its experts will be used.

    Attributes:
        device_type: `cpu` or `cuda`.
        compute_dtype: None takes that of the weights.
        mode: which of their parameters are trained, one of `EXPERT_MODES`.
        tokens_per_rank: about how many tokens a rank has at a time, or None.
    """

    device_type: str
    compute_dtype: torch.dtype | None
    mode: str
    tokens_per_rank: int | None

    def shapes(self, model: ModelWithConfig, module: ExpertsModule, ep_size: int) -> ExpertShapes:
        """Return what the choice of a backend depends on.

        Args:
            model: a transformers model.
            module: the experts of one of its layers, whole.
            ep_size: ranks they are split over.

        Raises:
            ConfigurationError: a mode that does not exist.
        """
        if self.mode not in EXPERT_MODES:
            wanted = join_words(EXPERT_MODES)
            raise ConfigurationError(
                f"expert_mode is {self.mode}, but it must be {wanted}.", parameters=("expert_mode",)
            )
        num_experts, hidden_size, intermediate_size = module.down_proj.shape
        top_k, tokens = model.config.num_experts_per_tok, self.tokens_per_rank
        return ExpertShapes(
            hidden_size,
            intermediate_size,
            self.compute_dtype or module.down_proj.dtype,
            self.device_type,
            mode=self.mode,
            gate=build_gate(module.act_fn),
            num_local_experts=num_experts // ep_size,
            top_k=top_k if ep_size == 1 else 1,  # rows of other ranks come one by one
            num_rows=None if tokens is None else tokens * top_k,
        )


def select_for_all_ranks(kernel: str, shapes: ExpertShapes) -> LoadedBackend:
    """Have rank 0 select: what others have measured, or what GPU they have, must not matter.

    **Collective:** every rank of the world must call.

    Raises:
        UserError: on every rank, as `select_and_load_backend`; also where one cannot run what
            rank 0 selected.
    """
    device = read_device_facts(shapes.device_type)
    selection = broadcast_from_rank0(lambda: select_backend(kernel, shapes, device))

    def check() -> None:
        reason = BACKENDS[selection.name].find_unsupported_reason(shapes, device)
        if reason is not None:
            raise ConfigurationError(
                f"rank 0 has selected {selection.name} for all ranks, but on rank "
                f"{dist.get_rank()} {reason}."
            )

    raise_on_all_ranks(check)
    return load_backend(selection)
