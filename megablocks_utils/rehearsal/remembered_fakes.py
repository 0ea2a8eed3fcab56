"""Fake tensors that remember what operators return: a rehearsal runs few kinds, many times each.

torch 2.13's own memory of this hashes some twenty properties of every argument in Python, which
takes most of a rehearsal's time. Here a key is what decides an output's sizes without symbols:
shapes, strides, offsets, dtypes and devices.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["RememberedFakes"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN_TYPES = frozenset((*_PLAIN, torch.memory_format))


class _Output(NamedTuple):
    """What an operator returns.

    Attributes:
        argument: number of the tensor that it is, or is a view of; None: new memory.
        is_view: whether it is another tensor than that argument.
    """

    argument: int | None
    is_view: bool = True
    shape: Sequence[int] = ()
    stride: Sequence[int] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


class _Outputs(NamedTuple):
    """What an operator returns, None among them.

    Attributes:
        kind: tuple or list; None: a single output.
    """

    kind: type | None
    outputs: tuple[_Output | None, ...]


class _Unknown(Exception):  # noqa: N818 - never seen by anyone
    """An argument or an output is not described by what is remembered."""


class RememberedFakes(FakeTensorMode):
    """Make fake tensors; calls of `aten` operators like an earlier one are answered from memory."""

    _remembered: ClassVar[dict[Hashable, _Outputs]] = {}

    def dispatch(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Return what an operator would."""
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        try:
            key = (func, *self._describe((*args, *sorted(kwargs.items())), tensors))
        except _Unknown:
            return super().dispatch(func, types, args, kwargs)
        known = self._remembered.get(key) if func.namespace == "aten" else None
        if known is not None:
            return self._build(known, tensors)
        found = super().dispatch(func, types, args, kwargs)
        if func.namespace == "aten":
            self._remember(key, found, tensors)
        return found

    def _describe(
        self, arguments: Sequence[object], tensors: list[FakeTensor]
    ) -> Iterator[Hashable]:
        """Yield all that decides an output of these arguments, and collect the tensors."""
        for argument in arguments:
            kind = type(argument)
            yield kind  # 1 is 1.0 is True
            if isinstance(argument, FakeTensor):
                if kind is not FakeTensor or argument.constant is not None:
                    raise _Unknown
                if argument.fake_mode is not self or argument.dtype.is_complex:
                    raise _Unknown
                tensors.append(argument)
                yield argument.shape
                yield argument.stride()
                yield argument.storage_offset()
                yield argument.dtype
                yield argument.fake_device
            elif isinstance(argument, list | tuple):
                yield len(argument)
                yield from self._describe(argument, tensors)
            elif kind in _PLAIN_TYPES:
                yield argument
            else:
                raise _Unknown

    def _remember(self, key: Hashable, found: object, tensors: Sequence[FakeTensor]) -> None:
        kind = list if isinstance(found, list) else tuple if isinstance(found, tuple) else None
        parts = found if isinstance(found, list | tuple) else (found,)
        arguments = {tensor.untyped_storage()._cdata: n for n, tensor in enumerate(tensors)}
        own = {id(tensor): n for n, tensor in enumerate(tensors)}
        outputs = []
        for part in parts:
            if part is None:
                outputs.append(None)
                continue
            if type(part) is not FakeTensor or part.constant is not None or part.dtype.is_complex:
                return
            if id(part) in own:
                outputs.append(_Output(own[id(part)], is_view=False))
                continue
            outputs.append(
                _Output(
                    arguments.get(part.untyped_storage()._cdata),
                    True,
                    tuple(part.shape),
                    part.stride(),
                    part.storage_offset(),
                    part.dtype,
                    part.fake_device,
                )
            )
        self._remembered[key] = _Outputs(kind, tuple(outputs))

    def _build(self, known: _Outputs, tensors: Sequence[FakeTensor]) -> object:
        built = [output and self._build_one(output, tensors) for output in known.outputs]
        return built[0] if known.kind is None else known.kind(built)

    def _build_one(self, output: _Output, tensors: Sequence[FakeTensor]) -> Tensor:
        if output.argument is None:
            elem = torch.empty_strided(
                output.shape, output.stride, dtype=output.dtype, device="meta"
            )
        elif not output.is_view:
            return tensors[output.argument]
        else:
            storage: Any = tensors[output.argument].untyped_storage()
            elem = torch.empty(0, dtype=output.dtype, device="meta")
            elem.set_(storage, output.offset, output.shape, output.stride)
        return FakeTensor(self, elem, output.device)
