"""Two libraries that have to be told about fake tensors, for as long as a rehearsal lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["no_launches", "one_example_a_row"]


@contextmanager
def no_launches() -> Iterator[None]:
    """Let every launch of an interpreted Triton kernel return at once, while entered.

    Triton 3.9 knows no fake tensors: its interpreter copies what it is given to real memory. What
    surrounds a launch (outputs, workspaces, what is kept for the backward pass) runs as it is. The
    process must have been started with TRITON_INTERPRET=1.

    Raises:
        ImportError: Triton is not installed.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = original


@contextmanager
def one_example_a_row() -> Iterator[None]:
    """Have transformers make no mask for a row of one example, as with real tensors.

    It looks at the positions for the start of another example, and transformers 5.23 takes fake
    ones for any number of examples.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
