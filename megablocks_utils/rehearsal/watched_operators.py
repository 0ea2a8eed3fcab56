"""One mode for all that a rehearsal does with each operator: three would cost twice as much."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megablocks_utils.rehearsal.assumptions import AssumedValues
from megablocks_utils.rehearsal.memory_ledger import MemoryLedger
from megablocks_utils.rehearsal.traffic_counter import TrafficCounter

__all__ = ["WatchedOperators"]


class WatchedOperators(TorchDispatchMode):
    """Have every operator answered or run, counted and booked, while entered."""

    def __init__(
        self, assumed: AssumedValues, traffic: TrafficCounter, ledger: MemoryLedger
    ) -> None:
        super().__init__()
        self._assumed = assumed
        self._traffic = traffic
        self._ledger = ledger

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each operator the guard against torch.compile, which a rehearsal never uses."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # as often asked as all operators are called
        results = self._assumed.answer(func, args)
        if results is NotImplemented:
            for kind in types:
                if kind is not FakeTensor and issubclass(kind, DTensor):
                    return NotImplemented  # it comes back with local tensors
            self._traffic.count(func, args)
            results = self._assumed.correct(func, func(*args, **(kwargs or {})))
        self._ledger.book(func, args, results)
        return results
