"""Read the part of a parameter that a rank holds, and no other byte of its tensors.

Parameters are named and split as in memory. A part of an expert weight is assembled from the Hub
tensors that overlap it. One stored tensor (or its wanted rows) is read at a time and cast while it
is copied, so that a rank holds hardly more than its own part.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import (
    TIED_PARAMETERS,
    ExpertPart,
    HubNaming,
    is_expert_parameter,
)
from megablocks_utils.errors import CheckpointError

__all__ = ["SliceReader", "check_finite", "stored_key"]


class SliceReader:
    """Fill parts of a model's parameters from a checkpoint that `check_against_model` has passed.

    Args:
        index: the checkpoint.
        naming: how it names its experts.
    """

    def __init__(self, index: CheckpointIndex, naming: HubNaming) -> None:
        self._index = index
        self._naming = naming

    def fill_local(self, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        """Read a part of a parameter into `local`, in its dtype and on its device.

        Args:
            name: of the parameter in the transformers model, not wrapped.
            local: the part, contiguous or not; may be empty, which reads nothing.
            offsets: where it begins in the whole parameter, along every dim.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or non-finite in this part.
        """
        if local.numel() == 0:
            return
        if is_expert_parameter(name):
            self._fill_experts(name, local, offsets)
            return
        key = stored_key(self._naming.hub_key(name), self._index)
        self._fill_rows(local, key, offsets[0], offsets[1:])

    def expert_matrix_shape(self, name: str, expert: int) -> tuple[int, int]:
        """Return (rows, columns) that an expert of an expert weight has, by what is stored."""
        part = next(self._naming.expert_parts(name, [expert]))
        num_rows, num_columns = self._index.shape(part.key)[-2:]
        return num_rows * part.num_shares, num_columns

    def _fill_experts(self, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        """Fill experts x rows x columns of a weight (E, rows, columns)."""
        first, first_row, first_column = offsets
        shape = self.expert_matrix_shape(name, first)
        for part in self._naming.expert_parts(name, range(first, first + len(local))):
            self._check_shape(part, shape)
            held = part.rows(shape[0])
            start = max(held.start, first_row)
            stop = min(held.stop, first_row + local.shape[1])
            if start >= stop:
                continue
            item = part.expert if part.is_fused else None
            target = local[part.expert - first, start - first_row : stop - first_row]
            self._fill_rows(target, part.key, start - held.start, (first_column,), item=item)

    def _check_shape(self, part: ExpertPart, matrix: tuple[int, int]) -> None:
        """Refuse a Hub tensor that does not fit its neighbours of the same weight."""
        seen = self._index.shape(part.key)
        wanted = part.hub_shape((seen[0], *matrix))
        if seen != wanted:
            raise CheckpointError(
                f"{part.key} in {self._index.path(part.key)} has shape {seen}, wanted is {wanted}"
            )

    def _fill_rows(
        self,
        target: Tensor,
        key: str,
        first_row: int,
        offsets: tuple[int, ...],
        *,
        item: int | None = None,
    ) -> None:
        """Read rows of a tensor, or of element `item` of its dim 0, check them and copy a window.

        The rows are freed on return, before any other tensor is read.

        Args:
            target: the window; its dim 0 says how many rows.
            key: of the stored tensor.
            first_row: the first row that is read.
            offsets: where the window begins along the dims after that of the rows.
            item: which element; None for a tensor whose dim 0 are the rows.
        """
        rows = self._index.read_rows(key, first_row, first_row + len(target), item=item)
        source = f"{key} in {self._index.path(key)}"
        check_finite(rows, source)
        for dim, offset in enumerate(offsets, start=1):
            if offset + target.shape[dim] > rows.shape[dim]:
                raise CheckpointError(
                    f"{source} has rows of shape {tuple(rows.shape[1:])}, wanted is "
                    f"{tuple(target.shape[1:])} at {offsets}"
                )
            rows = rows.narrow(dim, offset, target.shape[dim])
        target.copy_(rows)


def stored_key(
    key: str, index: CheckpointIndex, copies: Mapping[str, str] = TIED_PARAMETERS
) -> str:
    """Return `key`, or the tied copy under whose name the checkpoint stores the tensor instead."""
    stored = [copy for copy, source in copies.items() if source == key and copy in index]
    return stored[0] if stored and key not in index else key


def check_finite(tensor: Tensor, source: str) -> None:
    """Refuse a tensor, called `source` in the message, with values that are not finite.

    Raises:
        CheckpointError: it holds some.
    """
    # The extremes, which NaN and infinity pass through, need no memory; `isfinite` needs copies.
    if tensor.numel() == 0 or all(value.isfinite() for value in torch.aminmax(tensor)):
        return
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    noun = "value" if num_bad == 1 else "values"
    raise CheckpointError(f"{source} holds {num_bad} non-finite {noun}")
