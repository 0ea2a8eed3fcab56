"""Every read of stored weights in a stretch of code, and what of it was alive at once."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megablocks_utils.checkpoint import safetensors_header as header_module
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.mesh.placement import local_tensor


@dataclass
class Reads:
    """What was read.

    Attributes:
        spans: file, first byte in it and number of bytes of every read, in order.
    """

    spans: list[tuple[Path, int, int]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes read in all."""
        return sum(num_bytes for _, _, num_bytes in self.spans)

    def by_key(self, index: CheckpointIndex) -> list[tuple[str, int, int]]:
        """Return the tensor, the first byte in it and the number of bytes of every read."""
        entries = [(key, index._entry(key)) for key in index]
        return [
            (key, first - entry.offset, num_bytes)
            for path, first, num_bytes in self.spans
            for key, entry in entries
            if entry.path == path and 0 <= first - entry.offset < entry.num_bytes
        ]


@contextmanager
def recorded_reads() -> Iterator[Reads]:
    """Note every read, and refuse one while the tensor of the last one is still held."""
    reads, last, really_read = Reads(), None, header_module._read_bytes

    def read(entry: Any, offset: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal last
        assert last is None or last() is None, f"another tensor is held before {entry}"
        tensor = really_read(entry, offset, shape)
        last = weakref.ref(tensor)
        reads.spans.append((entry.path, offset, tensor.nbytes))
        return tensor

    with mock.patch.object(header_module, "_read_bytes", read):
        yield reads


class LiveBytes(TorchDispatchMode):
    """Watch every operator for the memory that what it and earlier ones made takes together.

    Attributes:
        most: the largest sum of bytes of CPU memory alive at once, made since it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Run the operator and look at its results."""
        known = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = operator(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and _key(result) not in known:
                self._note(local_tensor(result.detach()))
        return results

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        self._storages[_key(tensor)] = weakref.ref(tensor.untyped_storage())
        # FSDP1 frees memory by resizing storages, which no operator shows: so all are asked.
        alive = [(key, ref()) for key, ref in self._storages.items()]
        self._storages = {key: self._storages[key] for key, storage in alive if storage is not None}
        self.most = max(self.most, sum(s.nbytes() for _, s in alive if s is not None))


def _key(tensor: Tensor) -> int:
    return local_tensor(tensor.detach()).untyped_storage()._cdata


def model_to_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a model on meta a dtype, but not its buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
