"""What the C library keeps of memory that was freed. Torch-free."""

import ctypes
import os
from collections.abc import Mapping

__all__ = ["give_back_freed_memory", "read_kept_bytes"]

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 65536
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES, _OF_MALLOC = "GLIBC_TUNABLES", "glibc.malloc."


class _AllocatorInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def give_back_freed_memory(environ: Mapping[str, str] = os.environ) -> None:
    """Have glibc give back blocks above 64 KiB once they are freed, unless the user set it up.

    By itself it raises its threshold for blocks of their own to the largest one that was freed, up
    to 32 MiB; smaller ones then come from one heap, whose holes stay. Does nothing with another C
    library. It costs time: the system clears every page that it gives out again.
    """
    is_set = any(name in environ for name in _VARIABLES) or _OF_MALLOC in environ.get(_TUNABLES, "")
    library = ctypes.CDLL(None)
    if is_set or not hasattr(library, "mallopt"):
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    library.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
    library.malloc_trim(0)


def read_kept_bytes() -> int | None:
    """Return what glibc has got back from this process and not given back to the system.

    None with another C library.
    """
    read = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if read is None:
        return None
    read.restype = _AllocatorInfo
    return int(read().fordblks)
