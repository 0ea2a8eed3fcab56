"""A step's memory: what it saves for its backward pass, and its peak; a process's peak."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from megablocks_utils.mesh.placement import local_tensor

_CPU_PEAK = (
    "every allocation and release of torch's CPU allocator in the step, as torch.profiler records "
    "them (profile_memory), added up in order; the largest sum. Temporaries inside operators "
    "count, memory that libraries below torch take for themselves does not."
)
_RESET_PEAK = "5"  # proc(5)
_CUDA_PEAK = "torch.cuda.max_memory_allocated in the step less memory_allocated before it."


def describe_method(device: torch.device) -> dict[str, str]:
    """Say what the two measures count on this device."""
    return {
        "saved_bytes": "after the forward pass: the storages of all tensors that autograd has "
        "saved (torch.autograd.graph.saved_tensors_hooks), each distinct storage once and whole, "
        "without those of parameters, buffers and the step's inputs.",
        "peak_bytes": "the most that one step held at once above what was there at its start "
        "(weights, adapters, AdamW states, inputs; no gradients yet), its gradients included: "
        + (_CUDA_PEAK if device.type == "cuda" else _CPU_PEAK),
    }


def measure_saved_bytes(forward: Callable[[], Any], constants: Iterable[Tensor]) -> int:
    """Run a forward pass and count what it saves, without the storages of `constants`."""
    excluded = {_storage(tensor).data_ptr() for tensor in constants}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive forever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # Only now: while the graph of `output` lives, no address is used twice.
    total = sum(size for address, size in sizes.items() if address not in excluded)
    del output
    return total


def measure_peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Run a step and return the most bytes it held at once above those at its start.

    The step must not release memory that was there before it.
    """
    return _cuda_peak(step, device) if device.type == "cuda" else _cpu_peak(step)


def reset_peak_resident() -> None:
    """Start this process's high-water mark of resident memory (VmHWM) again; Linux only."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def _cpu_peak(step: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    in_order = sorted(changes, key=lambda change: change[0])
    return max(accumulate((size for _, size in in_order), initial=0))


def _cuda_peak(step: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return local_tensor(tensor.detach()).untyped_storage()
