"""Experts that lie on the ranks in another order than the model's: slots.

Slot by slot a layer's experts are split over `ep` as ever; which expert a slot holds is said here.
Routers, checkpoints, models and adapters know the model's own order alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["ExpertSlots"]


@dataclass(frozen=True, eq=False)
class ExpertSlots:
    """Which expert of a layer lies where.

    Attributes:
        experts: the expert in each slot; a rank of the ep group has as many slots as any other.
        slot_of: (E,) the slot of each expert, on the device of compute.
    """

    experts: tuple[int, ...]
    slot_of: Tensor

    @classmethod
    def build(cls, experts: Sequence[int], device: torch.device) -> Self:
        """Return the slots of experts, each of which must be in one."""
        assert sorted(experts) == list(range(len(experts))), experts
        return cls(tuple(experts), torch.tensor(experts).argsort().to(device))

    def route(self, top_k_index: Tensor) -> Tensor:
        """Return the slots (T, K) that a router's experts (T, K) lie in."""
        return self.slot_of[top_k_index]

    def to_model_order(self, by_slot: Tensor) -> Tensor:
        """Return a tensor (E, ...) that lies slot by slot in the order of the model; a copy."""
        return by_slot.index_select(0, self.slot_of.to(by_slot.device))
