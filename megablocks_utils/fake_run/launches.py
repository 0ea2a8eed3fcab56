"""Have Triton's kernels allocate, and compute nothing: fake tensors have no memory to point at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["no_launches"]


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
