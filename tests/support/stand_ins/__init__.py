"""Small plain modules under the names of packages that are not installed here.

They have the functions that our adapters call, with the documented signatures, do the same in plain
torch and refuse what the real ones refuse or get wrong. `packages` stands for the Python packages,
`cuda_extensions` for the compiled modules they import.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOTS = [str(Path(__file__).parent / name) for name in ("packages", "cuda_extensions")]
_NAMES = (
    *("scattermoe", "megablocks", "megablocks_ops"),
    *("grouped_gemm", "grouped_gemm_backend", "stk"),
)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Put them before the real packages, and afterwards everything back as it was."""
    real = _take_modules()
    sys.path[:0] = _ROOTS
    try:
        yield
    finally:
        for root in _ROOTS:
            sys.path.remove(root)
        _take_modules()
        sys.modules.update(real)


def _take_modules() -> dict:
    names = [name for name in sys.modules if name.partition(".")[0] in _NAMES]
    return {name: sys.modules.pop(name) for name in names}
