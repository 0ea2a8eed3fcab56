"""Compute the loss of the label tokens only.

The model is called with ``logits_to_keep=positions``, so that its output head (for a vocabulary of
50k the widest matmul there is, and the largest activation) runs only where a label is.
"""

import torch
import torch.nn.functional as F

from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["label_positions", "token_loss_sum"]


def label_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions whose next token is learned, and those tokens.

    Call it before moving labels to a GPU: the number of results has to reach the CPU.

    Args:
        labels: (1, T), -100 where not learned; the first label of each packed example must be -100,
            otherwise the example before it would be taught to predict it.

    Returns:
        positions: (P,) t with ``labels[0, t + 1] != -100``, ascending.
        targets: (P,) ``labels[0, t + 1]``.
    """
    following = labels[0, 1:]
    positions = (following != IGNORED_LABEL).nonzero().flatten()
    return positions, following[positions]


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
