"""Make hundreds of thousands of objects without Python's search for garbage in between."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["pause_garbage_search"]


@contextmanager
def pause_garbage_search() -> Iterator[None]:
    """Search for no garbage while entered.

    The search walks over all objects each time their number has grown by a quarter, those of torch
    and transformers too, and takes half of the time in which headers are read.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
