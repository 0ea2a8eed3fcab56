"""What nobody can know before a run, assumed: where tokens go, above all."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megablocks_utils.kernels import permute
from megablocks_utils.mesh.token_exchange import (
    ExchangeCounts,
    ExchangedCounts,
    PendingCounts,
    exchange_rows,
)
from megablocks_utils.planning.model.prediction import PlannedRun
from megablocks_utils.rehearsal.library_patches import (
    attention_of_a_gpu,
    copied_between_memories,
    no_launches,
    one_example_a_row,
    shape_grouped_mm,
)

__all__ = ["AssumedValues", "assume_counts", "assume_gpu_blocks", "pretend"]


def assume_counts(num_rows: int, imbalance: float) -> ExchangeCounts:
    """Return an `exchange_counts` of a rank that sends evenly, and receives more than its share.

    It makes the same exchange, and does not look at what came of it.

    Args:
        num_rows: rows that a rank routes in a layer.
        imbalance: received rows over `num_rows`.
    """

    def exchange(tokens_per_expert: Tensor, group: ProcessGroup, ep_size: int) -> PendingCounts:
        exchange_rows(tokens_per_expert, None, None, group)
        cells = _spread(math.ceil(num_rows * imbalance), len(tokens_per_expert))
        num_local = len(tokens_per_expert) // ep_size
        rows = [cells[start : start + num_local] for start in range(0, len(cells), num_local)]
        counts = ExchangedCounts(
            torch.tensor(rows, device=tokens_per_expert.device),
            send_sizes=_spread(num_rows, ep_size),
            receive_sizes=[sum(row) for row in rows],
        )
        return PendingCounts(lambda: counts)

    return exchange


def _spread(total: int, parts: int) -> list[int]:
    """Cut a number into parts as equal as can be."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@contextmanager
def assume_gpu_blocks() -> Iterator[None]:
    """Cut dot products into blocks as on a GPU, while entered, though tensors are on a CPU."""
    original = permute._BLOCK_ELEMENTS_CPU
    permute._BLOCK_ELEMENTS_CPU = permute._BLOCK_ELEMENTS
    try:
        yield
    finally:
        permute._BLOCK_ELEMENTS_CPU = original


def pretend(run: PlannedRun, on_host: Callable[[Tensor], None]) -> Iterator[AbstractContextManager]:
    """Yield what makes tensors fake, and libraries right about them.

    Args:
        run: what is planned.
        on_host: called with what is copied to host memory.
    """
    if run.kernel == "triton":
        yield no_launches()
    if run.device_type == "cuda":
        yield assume_gpu_blocks()
        yield attention_of_a_gpu()
    if run.offloaded != "none":
        yield copied_between_memories(on_host)
    if run.examples == 1:
        yield one_example_a_row()
    # Rotary frequencies are real: every model computes them when it is built.
    yield FakeTensorMode(allow_non_fake_inputs=True)


class AssumedValues(TorchDispatchMode):
    """Answer, while entered, the questions that fake tensors cannot.

    So many positions have labels; the optimizer has made one step. Any other question is an error,
    as it is without this.
    """

    def __init__(self, label_tokens: int) -> None:
        super().__init__()
        self._label_tokens = label_tokens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if args and isinstance(args[0], FakeTensor):
            tensor = args[0]
            if func is torch.ops.aten.nonzero.default and tensor.dim() == 1:
                count = min(len(tensor), self._label_tokens)
                return torch.empty(count, 1, dtype=torch.int64, device=tensor.device)
            if func is torch.ops.aten._local_scalar_dense.default and tensor.is_floating_point():
                return 1.0
            if func is torch.ops.aten._grouped_mm.default and tensor.dtype != torch.bfloat16:
                return shape_grouped_mm(*args[:3])
        return func(*args, **(kwargs or {}))
