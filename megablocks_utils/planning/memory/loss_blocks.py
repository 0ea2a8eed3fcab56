"""How the loss cuts logits into blocks: one rule for the run and for its plan."""

__all__ = ["block_length"]

_BLOCK_BYTES = 256 * 2**20
"""Of a block of logits in fp32: large enough to keep a GPU busy, small beside a layer's weights."""


def block_length(length: int, width: int) -> int:
    """Return how many rows of `width` logits the largest block has, of `length` as equal as can be.

    Width is the vocabulary where rows are cut, and the rows where the vocabulary is.
    """
    fitting = max(1, _BLOCK_BYTES // (4 * max(1, width)))
    num_blocks = -(-length // fitting)
    return -(-length // num_blocks) if num_blocks else 0
