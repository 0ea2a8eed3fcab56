"""Merge an adapter into the weights of its base model, one Hub tensor at a time.

The steps are PEFT's own, so that the result is what `merge_and_unload` gives: adapters in float32
(`PeftModel.from_pretrained` casts them), then for a linear layer one rounding, of the sum, and for
experts two, of what is added and of the sum. They are done for a block of rows at a time, which
changes no element and bounds the memory that is needed besides the tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megablocks_utils.checkpoint.hub_naming import HubNaming, MemoryPart
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.adapter_checks import FoundAdapter
from megablocks_utils.lora.adapter_reader import AdapterReader

__all__ = ["AdapterMerger"]

BLOCK_BYTES = 16 * 1024**2


class AdapterMerger:
    """Read the tensors of a base checkpoint, with the adapter merged into those that have one.

    Args:
        adapter: opened for the model that the checkpoint holds.
        index: the base checkpoint.
        naming: how it names its experts.
    """

    def __init__(self, adapter: AdapterReader, index: CheckpointIndex, naming: HubNaming):
        self._adapter = adapter
        self._index = index
        self._naming = naming
        # Tensors of one layer follow each other, so each of its adapters is read once.
        self._experts_module = ""
        self._experts: dict[str, tuple[Tensor, Tensor]] = {}

    def is_changed(self, key: str) -> bool:
        """Return whether the adapter changes the Hub tensor `key`."""
        name, adapter = self._naming.memory_part(key).name, self._adapter
        return (
            name in adapter.expert_parameters
            or _linear_name(name) in adapter.linears
            or name in adapter.found.replaced
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every Hub tensor of the checkpoint in its order, changed or not.

        Raises:
            CheckpointError: the adapter is not finite, or the sum is not.
        """
        for key in self._index:
            tensor = self._index.read(key)
            if self.is_changed(key):
                self._merge(key, tensor)
            yield key, tensor
            # Else it would still be held while the next one is read.
            del tensor

    def _merge(self, key: str, tensor: Tensor) -> None:
        part, adapter = self._naming.memory_part(key), self._adapter
        if part.name in adapter.found.replaced:
            tensor.copy_(adapter.replaced(part.name))
        if part.name in adapter.expert_parameters:
            self._merge_experts(key, part, tensor)
        elif (name := _linear_name(part.name)) in adapter.linears:
            lora_a, lora_b = adapter.linear(name)
            self._add(key, tensor, lora_a, lora_b, adapter.linears[name])

    def _merge_experts(self, key: str, part: MemoryPart, tensor: Tensor) -> None:
        lora_a, lora_b = self._read_experts(part.name)
        adapter = self._adapter.expert_parameters[part.name]
        if part.expert is None:
            for weight, a, b in zip(tensor, lora_a, lora_b, strict=True):
                self._add(key, weight, a, b, adapter)
            return
        first_row = part.share * tensor.shape[0]
        rows = lora_b[part.expert, first_row : first_row + tensor.shape[0]]
        self._add(key, tensor, lora_a[part.expert], rows, adapter)

    def _read_experts(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the adapters of all experts of a parameter, held until another layer's come."""
        module = name.rpartition(".")[0]
        if module != self._experts_module:
            self._experts.clear()
            self._experts_module = module
        if name not in self._experts:
            num_experts = self._adapter.expert_parameters[name].shape[0]
            self._experts[name] = self._adapter.experts(name, range(num_experts))
        return self._experts[name]

    def _add(
        self, key: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, adapter: FoundAdapter
    ) -> None:
        """Add scaling * B @ A to a weight (out, in), in place, as PEFT does."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lora_a = lora_a.to(dtype)
        num_rows = max(1, BLOCK_BYTES // (weight.shape[1] * dtype.itemsize))
        for rows, b in zip(weight.split(num_rows), lora_b.split(num_rows), strict=True):
            delta = (b.to(dtype) @ lora_a).mul_(adapter.scaling)
            rows += delta.to(weight.dtype) if adapter.is_parameter else delta
            # By blocks, because the check needs more than twice the bytes of what it checks.
            if not rows.isfinite().all():
                raise CheckpointError(f"{key} with the adapter added is not finite")


def _linear_name(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")
