"""Whether a predicted peak fits, and what takes most of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megablocks_utils.planning.model.prediction import Prediction

__all__ = ["CONTEXT_BYTES", "FITS", "FRAGMENTATION", "OOM", "TIGHT", "WORDS", "Verdict", "judge"]

FITS, TIGHT, OOM = "fits", "tight", "oom"

FRAGMENTATION = 0.10
"""Of the peak: what the CUDA allocator holds and cannot use.

Source: one public run of this kind reserved 21 % more than another one allocated, with other
software and the CUDA context in it (fms-acceleration `refs/a100_80gb_moe.csv`, 56,687 MiB, against
the 49 GB of the published table); half of it as fragmentation, the rest is `CONTEXT_BYTES` and
unexplained. Not measured with this project.
"""
CONTEXT_BYTES = 1_500_000_000
"""CUDA context, NCCL's buffers and the workspaces of cuBLAS. Same source, same doubt."""

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "parameters": "parameters",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "fsdp_buffers": "FSDP buffers",
        "activations": "activations",
        "dispatch_buffers": "dispatch buffers",
    }
)


@dataclass(frozen=True)
class Verdict:
    """Say whether a peak fits.

    Attributes:
        name: `fits`; `tight` where it fits without the whole reserve; `oom`.
        cause: the component with most bytes, in words.
        peak_bytes: what the run's tensors need.
        reserve_bytes: what should be left beside them; 0 on a CPU.
        capacity_bytes: what there is.
    """

    name: str
    cause: str
    peak_bytes: int
    reserve_bytes: int
    capacity_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """What is left of the capacity after peak and reserve; negative where they do not fit."""
        return self.capacity_bytes - self.peak_bytes - self.reserve_bytes

    @property
    def is_impossible(self) -> bool:
        """Whether the tensors alone are more than there is."""
        return self.peak_bytes > self.capacity_bytes


def judge(prediction: Prediction, capacity_bytes: int, device_type: str = "cuda") -> Verdict:
    """Compare a predicted peak with the memory of a device.

    A GPU needs room for its context in any case, and for fragmentation to be safe. A CPU needs
    neither: its capacity is what the process may take.
    """
    peak, on_gpu = prediction.peak_bytes, device_type == "cuda"
    context = CONTEXT_BYTES if on_gpu else 0
    reserve = context + (math.ceil(peak * FRAGMENTATION) if on_gpu else 0)
    name = FITS
    if peak + context > capacity_bytes:
        name = OOM
    elif peak + reserve > capacity_bytes:
        name = TIGHT
    return Verdict(name, WORDS[prediction.largest_component], peak, reserve, capacity_bytes)
