"""Compute the loss of the label tokens only.

The output head (for a vocabulary of 50k the widest matmul there is, and the largest activation)
runs only where a label is, see `forward`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["LabelPositions", "label_positions", "token_loss_sum"]


@dataclass(frozen=True)
class LabelPositions:
    """Hold the positions of a batch whose next token is learned, and those tokens.

    Attributes:
        rows: (P,) row of each.
        columns: (P,) t with ``labels[row, t + 1] != -100``, ascending in each row.
        targets: (P,) ``labels[row, t + 1]``.
        num_rows: rows of the batch.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    num_rows: int

    def take_from(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (B, T, D) at these positions: (1, P, D)."""
        if self.num_rows == 1:
            return values[:, self.columns]
        return values[self.rows, self.columns][None]

    def to(self, device: torch.device) -> "LabelPositions":
        """Return the same on a device."""
        return replace(
            self,
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            targets=self.targets.to(device),
        )


def label_positions(labels: torch.Tensor, columns: slice | None = None) -> LabelPositions:
    """Find the positions whose next token is learned.

    Call it before moving labels to a GPU: the number of results has to reach the CPU.

    Args:
        labels: (B, T), -100 where not learned; the first label of each packed example must be -100,
            otherwise the example before it would be taught to predict it.
        columns: tokens of each row that are looked at, counted from its first; the last one's next
            token may be outside. None: all.
    """
    columns = columns or slice(0, labels.shape[1])
    following = labels[:, columns.start + 1 : columns.stop + 1]
    num_rows, width = len(labels), max(1, following.shape[1])
    following = following.flatten()
    found = (following != IGNORED_LABEL).nonzero().flatten()
    return LabelPositions(found // width, found % width, following[found], num_rows)


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tokens' cross entropies, computed in fp32.

    With no token it is a zero that can still be differentiated, so that a rank without labels
    enters every collective of the backward pass.

    Args:
        logits: (1, P, V) in any float dtype.
        targets: (P,) tokens.

    Returns:
        Scalar, fp32.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
