"""What the libraries must be, and are told, before they are imported. Torch-free."""

import os
import re
from collections.abc import Mapping, MutableMapping
from importlib import metadata
from types import MappingProxyType

from megablocks_utils.errors import ConfigurationError

__all__ = ["OLDEST", "check_versions", "set_allocator"]

OLDEST: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"torch": (2, 11), "transformers": (5, 23), "accelerate": (1, 14), "peft": (0, 21)}
)
"""As pyproject.toml has them, which counts only where this project was installed by pip."""
_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_ALLOCATOR_NAMES = (_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def check_versions() -> None:
    """Refuse libraries that are too old: they fail somewhere, or do something else in silence.

    Raises:
        ConfigurationError: naming one of them.
    """
    for name, oldest in OLDEST.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # for who imports it to say
        # Not by a version's rules: a vendor's 2.11.0a0 is a build of 2.11.
        numbers = tuple(map(int, re.findall(r"[0-9]+", found)[:2]))
        if numbers < oldest:
            raise ConfigurationError(
                f"{name} {found} is installed, but it must be {'.'.join(map(str, oldest))} or "
                "newer; requirements.txt lists versions that work."
            )


def set_allocator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator on GPUs use segments that grow, unless the user has set it up.

    Every layer of every step asks for other sizes, which leave fixed segments in pieces.
    """
    if not any(name in environ for name in _ALLOCATOR_NAMES):
        environ[_ALLOCATOR] = "expandable_segments:True"
