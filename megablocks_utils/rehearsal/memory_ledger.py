"""Book every byte that tensors take, when they take it, and what for.

What torch has for this (`torch.distributed._tools.fsdp2_mem_tracker`) books experts outside of FSDP
as activations, wants its statistics reset in every micro-step, and counts the global shapes that
DTensor makes to work out placements.
"""

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.rehearsal.library_patches import watch_resizes
from megablocks_utils.rehearsal.memory_origin import FSDP_BUFFERS, find_origin

__all__ = ["HOST", "IN_LAYERS", "LedgerPeak", "MemoryLedger"]

HOST = "host"
"""What is in host memory, and so not on the device."""
_JOINS_GRADIENTS = "chunk_cat"
IN_LAYERS = "backward of the layers"
"""The moment from when the way back has reached the last layer: with the head it is another peak,
which other sizes decide."""


@dataclass(frozen=True)
class LedgerPeak:
    """The moment at which most was held.

    Attributes:
        components: bytes by component.
        moment: what the run was doing.
    """

    components: dict[str, int]
    moment: str

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return sum(self.components.values())


class MemoryLedger:
    """Book the storages of what operators return; entered, also those that are resized.

    A storage belongs to the component that `find_origin` names when it is made, unless `assign`
    says later what has become of it. Memory is booked until the storage is gone, or resized.

    Attributes:
        moment: what the run is doing now; the owner sets it, and the first backward function
            makes it `backward`.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self.moment = "setup"
        self._device_type = device_type
        self._sizes: dict[int, int] = {}  # live storages, by number
        self._numbers: dict[int, int] = {}  # live storages, by address
        self._origins: list[str] = []
        self._events: list[tuple[int, int]] = []
        self._moments: list[tuple[int, str]] = []
        self._first_event = 0

    def __enter__(self) -> "MemoryLedger":
        self._resizes = watch_resizes(self._book_resize)
        self._resizes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._resizes.__exit__(*error)

    def book(self, func: Any, args: tuple, results: Any) -> None:
        """Book what an operator has returned."""
        leaves = (results,) if isinstance(results, Tensor) else tree_leaves(results)
        for result in leaves:
            if isinstance(result, PackedExperts):
                continue  # it has no memory but its parts, which other operators return
            if isinstance(result, Tensor) and result.device.type == self._device_type:
                self._book(result.untyped_storage())
        if _JOINS_GRADIENTS in func.__name__:
            # What FSDP is about to reduce are gradients of whole weights, made by autograd.
            self.assign(tree_leaves(args), FSDP_BUFFERS, unless="parameters")

    def assign(self, tensors: Iterable[Any], component: str, *, unless: str = "") -> None:
        """Say what tensors are, from when they were made; what is not booked is left out.

        Args:
            tensors: DTensors stand for their local tensors; anything else is passed over.
            component: which.
            unless: a component that is left as it is.
        """
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            number = self._numbers.get(local.untyped_storage()._cdata)
            if number is not None and self._origins[number] != unless:
                self._origins[number] = component

    def watch_layers(self, last_layer: nn.Module) -> None:
        """Name the moment in which the way back reaches the last layer."""

        def reach(_gradient: Tensor) -> None:
            self.moment = IN_LAYERS

        def watch(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            if first.requires_grad:
                first.register_hook(reach)

        last_layer.register_forward_hook(watch)

    def open(self) -> None:
        """Look for the peak from now on."""
        self._first_event = len(self._events)

    @property
    def held_bytes(self) -> int:
        """What is held on the device now."""
        return sum(n for number, n in self._sizes.items() if self._origins[number] != HOST)

    def find_host_peak(self) -> int:
        """Return how much was held in host memory at most, since `open`."""
        changes = (n if self._origins[number] == HOST else 0 for number, n in self._events)
        return max(list(accumulate(changes))[self._first_event :], default=0)

    def find_peaks(self) -> list[LedgerPeak]:
        """Return when most was held in each moment that the owner has named, since `open`."""
        changes = (0 if self._origins[number] == HOST else n for number, n in self._events)
        totals = list(accumulate(changes))
        starts = [start for start, _ in self._moments]
        fullest: dict[str, int] = {}
        for event in range(self._first_event, len(totals)):
            name = self._moments[bisect_right(starts, event) - 1][1]
            if name not in fullest or totals[event] > totals[fullest[name]]:
                fullest[name] = event
        return [self._describe(event, name) for name, event in fullest.items()]

    def _describe(self, event: int, moment: str) -> LedgerPeak:
        held: Counter[str] = Counter()
        for number, change in self._events[: event + 1]:
            held[self._origins[number]] += change
        del held[HOST]
        return LedgerPeak({name: size for name, size in held.items() if size}, moment)

    def _book(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._numbers:
            return
        origin = find_origin()
        if origin is None:
            return
        number = self._numbers[address] = len(self._origins)
        self._origins.append(origin)
        self._change(number, storage.nbytes())
        weakref.finalize(storage, self._book_end, address)

    def _book_end(self, address: int) -> None:
        number = self._numbers.pop(address)
        self._change(number, 0)
        del self._sizes[number]

    def _book_resize(self, storage: torch.UntypedStorage) -> None:
        """FSDP frees what it has gathered by resizing it to nothing."""
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self._change(number, storage.nbytes())

    def _change(self, number: int, size: int) -> None:
        if torch._C._current_autograd_node() is not None and self.moment != IN_LAYERS:
            self.moment = "backward"
        if not self._moments or self._moments[-1][1] != self.moment:
            self._moments.append((len(self._events), self.moment))
        self._events.append((number, size - self._sizes.get(number, 0)))
        self._sizes[number] = size
