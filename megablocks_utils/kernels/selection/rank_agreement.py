"""One selection of the experts' backend for all ranks."""

from collections.abc import Sequence

import torch.distributed as dist

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.device import read_device_facts
from megablocks_utils.kernels.selection.backend_selection import (
    LoadedBackend,
    load_backend,
    select_backend,
)
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks

__all__ = ["select_for_all_ranks"]


def select_for_all_ranks(
    kernel: str, shapes: ExpertShapes, others: Sequence[ExpertShapes] = ()
) -> LoadedBackend:
    """Have rank 0 select: what others have measured, or what GPU they have, must not matter.

    **Collective:** every rank of the world must call.

    Args:
        kernel: `auto` or the name of a backend.
        shapes: the experts.
        others: experts of other layers that differ.

    Raises:
        UserError: on every rank, as `select_and_load_backend`; also where one cannot run what
            rank 0 selected.
    """
    device = read_device_facts(shapes.device_type)
    selection = broadcast_from_rank0(lambda: select_backend(kernel, shapes, device, others=others))

    def check() -> None:
        for kind in (shapes, *others):
            reason = BACKENDS[selection.name].find_unsupported_reason(kind, device)
            if reason is not None:
                raise ConfigurationError(
                    f"rank 0 has selected {selection.name} for all ranks, but on rank "
                    f"{dist.get_rank()} {reason}."
                )

    raise_on_all_ranks(check)
    return load_backend(selection)
