"""What this process holds: device memory on a GPU, resident memory on a CPU."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "MemoryReading",
    "describe_memory_source",
    "read_available_memory",
    "read_memory",
]

PROCESS_STATUS = Path("/proc/self/status")
MEMORY_INFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MemoryReading:
    """Memory of this rank in bytes: its peak since the run's start, and what it holds now."""

    peak_bytes: int
    allocated_bytes: int


def read_memory(device: torch.device, status_path: Path = PROCESS_STATUS) -> MemoryReading:
    """Read this rank's memory.

    On CUDA these are the tensors of PyTorch's allocator on `device`. Elsewhere they are the
    resident set of the whole process, Python and libraries included; where the kernel's status
    file is missing, the peak stands for both.

    Args:
        device: The device this rank computes on.
        status_path: The kernel's status file of this process.
    """
    if device.type == "cuda":
        return MemoryReading(
            torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        )
    status = _read_status(status_path)
    peak_bytes = status.get("VmHWM", _peak_resident_bytes())
    return MemoryReading(peak_bytes, status.get("VmRSS", peak_bytes))


def read_available_memory(meminfo_path: Path = MEMORY_INFO) -> int:
    """Read how many bytes of this machine's memory a process could still take, without swapping."""
    fields = _read_status(meminfo_path)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return fields.get("MemAvailable", free)


def describe_memory_source(device: torch.device, status_path: Path = PROCESS_STATUS) -> str:
    """Describe what `read_memory` measures on this machine."""
    if device.type == "cuda":
        return "CUDA tensors (torch.cuda.max_memory_allocated, memory_allocated)"
    status = _read_status(status_path)
    peak = "VmHWM" if "VmHWM" in status else "getrusage ru_maxrss"
    return f"resident memory of the process ({peak}, {'VmRSS' if 'VmRSS' in status else peak})"


def _read_status(path: Path) -> dict[str, int]:
    """Return the status file's sizes in bytes by name; empty where there is no such file."""
    if not path.exists():
        return {}
    fields = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) * 1024
        for words in fields
        if len(words) == 3 and words[2] == "kB"
    }


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
