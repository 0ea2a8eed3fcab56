"""Fake tensors that remember what operators return: a rehearsal runs few kinds, many times each.

torch 2.13's own memory of this hashes some twenty properties of every argument in Python, which
takes most of a rehearsal's time. Here a key is what decides an output's sizes without symbols:
shapes, strides, offsets, dtypes and devices.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["RememberedFakes"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN_TYPES = frozenset((*_PLAIN, torch.memory_format))


class _Output(NamedTuple):
    """A tensor that an operator returns.

    Attributes:
        argument: number of the tensor that it is, or is a view of; None: new memory.
        strided: its shape, strides and offset; None where it is that argument itself.
        dtype: of its elements.
        device: where it pretends to be.
        attributes: what else a fake tensor has.
    """

    argument: int | None
    strided: tuple[tuple[int, ...], tuple[int, ...], int] | None
    dtype: torch.dtype
    device: torch.device
    attributes: Mapping[str, object]


class _Outputs(NamedTuple):
    """What an operator returns, None among them.

    Attributes:
        kind: tuple or list; None: a single output.
    """

    kind: type | None
    outputs: tuple[_Output | None, ...]


class _Unknown(Exception):
    """An argument or an output is not described by what is remembered."""


class RememberedFakes(FakeTensorMode):
    """Make fake tensors; calls of `aten` operators like an earlier one are answered from memory."""

    _remembered: ClassVar[dict[Hashable, _Outputs]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each operator the guard against torch.compile, which a rehearsal never uses."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return self.dispatch(func, types, args, kwargs)

    def dispatch(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Return what an operator would."""
        if func.namespace != "aten":
            return super().dispatch(func, types, args, kwargs or {})
        arguments = (*args, *sorted((kwargs or {}).items()))
        tensors: list[FakeTensor] = []
        described: list[object] = [func]
        try:
            self._describe(arguments, tensors, described)
        except _Unknown:
            return super().dispatch(func, types, args, kwargs or {})
        key = tuple(described)
        known = self._remembered.get(key)
        if known is not None:
            return self._build(known, tensors)
        storages = [_address(tensor) for tensor in tensors]
        found = super().dispatch(func, types, args, kwargs or {})
        # Not what changes an argument's sizes or its storage, as `set_` does.
        is_same = storages == [_address(tensor) for tensor in tensors]
        again: list[object] = [func]
        self._describe(arguments, [], again)
        if is_same and described == again:
            self._remember(key, found, tensors)
        return found

    def _describe(
        self, arguments: Sequence[object], tensors: list[FakeTensor], described: list[object]
    ) -> None:
        """Add all that decides an output of these arguments, and collect the tensors."""
        for argument in arguments:
            kind = type(argument)
            if isinstance(argument, FakeTensor):
                if kind is not FakeTensor or argument.constant is not None:
                    raise _Unknown
                dtype = argument.dtype
                if argument.fake_mode is not self or dtype.is_complex:
                    raise _Unknown
                tensors.append(argument)
                described += (argument.shape, argument.stride(), argument.storage_offset())
                described += (dtype, argument.fake_device)
            elif kind in _PLAIN_TYPES:
                described += (kind, argument)  # 1 is 1.0 is True
            elif isinstance(argument, list | tuple):
                described += (kind, len(argument))
                self._describe(argument, tensors, described)
            else:
                raise _Unknown

    def _remember(self, key: Hashable, found: object, tensors: Sequence[FakeTensor]) -> None:
        parts = found if isinstance(found, list | tuple) else (found,)
        outputs: list[_Output | None] = []
        for part in parts:
            if part is None:
                outputs.append(None)
            elif type(part) is FakeTensor and part.constant is None and not part.is_complex():
                outputs.append(_describe_output(part, tensors))
            else:
                return
        is_single = not isinstance(found, list | tuple)
        kind = None if is_single else list if isinstance(found, list) else tuple
        self._remembered[key] = _Outputs(kind, tuple(outputs))

    def _build(self, known: _Outputs, tensors: Sequence[FakeTensor]) -> object:
        built = [output and self._build_one(output, tensors) for output in known.outputs]
        return built[0] if known.kind is None else known.kind(built)

    def _build_one(self, output: _Output, tensors: Sequence[FakeTensor]) -> Tensor:
        if output.strided is None:
            assert output.argument is not None, "it is one of the arguments"
            return tensors[output.argument]
        shape, stride, offset = output.strided
        if output.argument is None:
            elem = torch.empty_strided(shape, stride, dtype=output.dtype, device="meta")
        else:
            storage = tensors[output.argument].untyped_storage()
            elem = torch.empty(0, dtype=output.dtype, device="meta")
            elem.set_(storage, offset, shape, stride)
        fake = Tensor._make_subclass(
            FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=output.device
        )
        vars(fake).update(output.attributes, fake_mode=self)
        return fake


def _describe_output(part: FakeTensor, tensors: Sequence[FakeTensor]) -> _Output:
    """Describe a tensor that an operator has just returned for these arguments."""
    attributes = {name: value for name, value in vars(part).items() if name != "fake_mode"}
    for number, tensor in enumerate(tensors):
        if part is tensor:
            return _Output(number, None, part.dtype, part.fake_device, {})
    storages = [_address(tensor) for tensor in tensors]
    address = _address(part)
    argument = storages.index(address) if address in storages else None
    strided = tuple(part.shape), part.stride(), int(part.storage_offset())
    return _Output(argument, strided, part.dtype, part.fake_device, attributes)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
