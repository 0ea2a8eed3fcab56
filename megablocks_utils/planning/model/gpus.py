"""What GPUs are, as far as a plan asks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megablocks_utils.byte_units import GIB

__all__ = ["DEFAULT_GPU", "GPUS", "Gpu", "find_peak_flops"]

_SLOWER = re.compile(r"\b(PCIe|NVL)\b", re.IGNORECASE)
"""Forms of a Hopper GPU that compute at lower clocks; an A100's do not differ in their peak."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in the nodes it is sold in.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: what the driver says there is, all processes together.
        peak_flops: dense bf16 operations a second.
        intra_bytes_per_s: one way, from one GPU to the others of its node.
        inter_bytes_per_s: one way, a GPU's share of its node's network.
        gpus_per_node: as sold.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    gpus_per_node: int = 8


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("a100-40g", round(39.39 * GIB), 312e12, 300e9, 25e9),
            Gpu("a100-80g", round(79.14 * GIB), 312e12, 300e9, 25e9),
            Gpu("h100-80g", round(79.10 * GIB), 989.4e12, 450e9, 50e9),
            Gpu("h200-141g", round(139.72 * GIB), 989.4e12, 450e9, 50e9),
            Gpu("b200-180g", round(178.35 * GIB), 2250e12, 900e9, 50e9),
            Gpu("l40s-48g", round(44.39 * GIB), 362.05e12, 32e9, 6.25e9),
        )
    }
)
"""By name.

Memory: the "total capacity" that torch's out-of-memory messages give, which is the driver's
`totalGlobalMem`; the smallest value seen in public reports. It differs by some 0.1 GiB between
drivers. Peak: NVIDIA's data sheets, bf16 without sparsity, SXM modules (B200: HGX B200, an eighth
of 36 PFLOP/s with sparsity, halved). Within a node: NVLink 3, 4 and 5, 600, 900 and 1800 GB/s both
ways (data sheets), halved; L40S has none: PCIe 4.0 x16, 64 GB/s both ways. Between nodes: DGX A100
has a 200 Gb/s adapter a GPU, DGX H100, H200 and B200 one of 400 Gb/s (data sheets); L40S as in AWS
g6e.48xlarge, 400 Gb/s for 8 GPUs. A cloud's network may be slower.
"""

DEFAULT_GPU = "a100-80g"
"""Whose speed and links are taken where only memory is given."""


def find_peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations a second of a GPU by its driver's name; None if unknown."""
    for gpu in GPUS.values():
        chip = gpu.name.partition("-")[0]
        if re.search(rf"\b{chip}\b", device_name, re.IGNORECASE):
            is_slower = chip.startswith("h") and _SLOWER.search(device_name)
            return None if is_slower else gpu.peak_flops
    return None
