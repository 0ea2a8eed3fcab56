"""Merge an adapter into the weights of its base model, one Hub tensor at a time.

The steps are PEFT's own, so that the result is what `merge_and_unload` gives: adapters in float32
(`PeftModel.from_pretrained` casts them), then for a linear layer one rounding, of the sum, and for
experts two, of what is added and of the sum. They are done for a block of rows at a time, which
changes no element and bounds the memory that is needed besides the tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megablocks_utils.checkpoint.expert_trace import ExpertPart
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.adapter_checks import FoundAdapter
from megablocks_utils.lora.adapter_reader import AdapterReader
from megablocks_utils.lora.rounded_base import RoundedBase

__all__ = ["AdapterMerger"]

BLOCK_BYTES = 16 * 1024**2


class AdapterMerger:
    """Read the tensors of a base checkpoint, with the adapter merged into those that have one.

    Args:
        adapter: opened for the model that the checkpoint holds.
        index: the base checkpoint, or what a format keeps of its experts.
        layout: where the model's weights lie in it.
    """

    def __init__(
        self, adapter: AdapterReader, index: CheckpointIndex | RoundedBase, layout: ModelLayout
    ):
        self._adapter = adapter
        self._index = index
        self._layout = layout
        # Tensors of one layer follow each other, so each of its adapters is read once.
        self._experts_module = ""
        self._experts: dict[str, tuple[Tensor, Tensor]] = {}
        self._parts: dict[str, dict[str, list[ExpertPart]]] = {}
        # Of dense weights that transformers converts, several stored tensors are made at once.
        self._converted: dict[str, Tensor] = {}

    def is_changed(self, key: str) -> bool:
        """Return whether the Hub tensor `key` is another one than that of the base."""
        is_rounded = isinstance(self._index, RoundedBase) and self._index.is_rounded(key)
        return is_rounded or self._is_adapted(key)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every Hub tensor of the checkpoint in its order, changed or not.

        Raises:
            CheckpointError: the adapter is not finite, or the sum is not.
        """
        for key in self._index:
            tensor = self._read_merged(key)
            yield key, tensor
            # Else it would still be held while the next one is read.
            del tensor

    def _is_adapted(self, key: str) -> bool:
        return any(self._changes(name, key) for name in self._layout.names(key))

    def _changes(self, name: str, key: str) -> bool:
        """Return whether the adapter changes what the parameter `name` has of a Hub tensor."""
        adapter = self._adapter
        if name in adapter.expert_parameters:
            # A list of experts can be that of two layers, the first ones of one of them.
            return key in self._parts_of(name)
        return _linear_name(name) in adapter.linears or name in adapter.found.replaced

    def _read_merged(self, key: str) -> Tensor:
        if key in self._converted:
            return self._converted.pop(key)
        names = self._layout.names(key)
        tensor = self._index.read(key)
        if not self._is_adapted(key):
            return tensor
        if any(not (self._layout.is_plain(n) or self._layout.is_expert(n)) for n in names):
            self._convert(names)
            return self._converted.pop(key)
        for name in names:
            if self._changes(name, key):
                self._merge(key, name, tensor)
        return tensor

    def _convert(self, names: tuple[str, ...]) -> None:
        """Merge into weights as they are in memory, and keep what is stored of them."""
        for name in names:
            weight = self._layout.convert(name, self._index.read).contiguous()
            if self._changes(name, name):
                self._merge(name, name, weight)
            for key, tensor in self._layout.hub_tensors(name, weight):
                self._converted[key] = tensor.contiguous()

    def _merge(self, key: str, name: str, tensor: Tensor) -> None:
        adapter = self._adapter
        if name in adapter.found.replaced:
            tensor.copy_(adapter.replaced(name))
        if name in adapter.expert_parameters:
            self._merge_experts(key, name, tensor)
        elif (linear := _linear_name(name)) in adapter.linears:
            lora_a, lora_b = adapter.linear(linear)
            self._add(key, tensor, lora_a, lora_b, adapter.linears[linear])

    def _merge_experts(self, key: str, name: str, tensor: Tensor) -> None:
        lora_a, lora_b = self._read_experts(name)
        adapter = self._adapter.expert_parameters[name]
        for part in self._parts_of(name)[key]:
            weight = part.stored_block(tensor if part.item is None else tensor[part.item])
            outputs, inputs = part.rows.memory, part.columns.memory
            if adapter.is_transposed:
                weight, outputs, inputs = weight.T, inputs, outputs
            a = lora_a[part.expert][:, _as_slice(inputs)]
            self._add(key, weight, a, lora_b[part.expert][_as_slice(outputs)], adapter)

    def _parts_of(self, name: str) -> dict[str, list[ExpertPart]]:
        """Return what the stored tensors hold of a parameter's experts, by stored tensor."""
        if name not in self._parts:
            num_experts = self._adapter.expert_parameters[name].num_stored
            found: dict[str, list[ExpertPart]] = {}
            for part in self._layout.expert_parts(name, range(num_experts)):
                found.setdefault(part.key, []).append(part)
            self._parts[name] = found
        return self._parts[name]

    def _read_experts(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the adapters of all experts of a parameter, held until another layer's come."""
        module = name.rpartition(".")[0]
        if module != self._experts_module:
            self._experts.clear()
            self._parts.clear()
            self._experts_module = module
        if name not in self._experts:
            num_experts = self._adapter.expert_parameters[name].num_stored
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


def _as_slice(span: range) -> slice:
    return slice(span.start, span.stop, span.step)


def _linear_name(parameter_name: str) -> str:
    return parameter_name.removesuffix(".weight")
