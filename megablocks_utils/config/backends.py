"""The backends that can run experts: what must be known of each before torch is imported.

All else about a backend is in its file, `kernels/backends/NAME.py`. A new one needs a record here,
that file, and its place in `kernels/backends/backend_table.py`.
"""

from dataclasses import dataclass

__all__ = ["AUTO", "BACKENDS", "KERNEL_CHOICES", "BackendFacts", "list_backends"]

AUTO = "auto"
"""The choice that leaves it to this project: the fastest backend that was measured."""


@dataclass(frozen=True)
class BackendFacts:
    """Say what options need to know of a backend.

    Attributes:
        name: as `--kernel` has it.
        supports_adapters: whether it runs experts with LoRA adapters.
        supports_biases: whether it runs experts with biases.
        supports_packed: whether it was tried with experts that are packed in few bits.
        unpacks: formats of these that it takes as they are; others are dequantized for it.
    """

    name: str
    supports_adapters: bool = True
    supports_biases: bool = True
    supports_packed: bool = True
    unpacks: tuple[str, ...] = ()


EAGER = BackendFacts("eager")
GROUPED_MM = BackendFacts("grouped_mm")
TRITON = BackendFacts("triton", unpacks=("nf4", "mxfp4"))
SCATTERMOE = BackendFacts("scattermoe", supports_adapters=False, supports_packed=False)
MEGABLOCKS = BackendFacts(
    "megablocks", supports_adapters=False, supports_biases=False, supports_packed=False
)

BACKENDS = (EAGER, GROUPED_MM, TRITON, SCATTERMOE, MEGABLOCKS)
KERNEL_CHOICES = (AUTO, *(backend.name for backend in BACKENDS))


def list_backends(
    *, with_adapters: bool = False, with_biases: bool = False, with_packed: bool = False
) -> list[str]:
    """Return the names of the backends that support all that is asked for."""
    return [
        backend.name
        for backend in BACKENDS
        if (backend.supports_adapters or not with_adapters)
        and (backend.supports_biases or not with_biases)
        and (backend.supports_packed or not with_packed)
    ]
