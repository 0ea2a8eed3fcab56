"""What libraries get wrong about fake tensors, put right for as long as a rehearsal lasts.

Each patch names its cause. `tests/rehearsal/test_library_patches.py` asserts that each is still
needed: when an upgrade makes one of those tests fail, its patch can go.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

__all__ = [
    "attention_of_a_gpu",
    "copied_between_memories",
    "large_on_meta",
    "no_launches",
    "one_example_a_row",
    "shape_grouped_mm",
    "watch_resizes",
    "without_values",
]

_MAKES_TENSORS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand)
_DRAWS = (Tensor.uniform_, init.uniform_, init.kaiming_uniform_)
_LARGE_BYTES = 2**28
_COPY_IN, _COPY_OUT = ("_fsdp_param.py", "cpu_offload.py"), "_fsdp_collectives.py"


@contextmanager
def copied_between_memories(on_host: Callable[[Tensor], None]) -> Iterator[None]:
    """Let what is offloaded be copied, while entered, as between a GPU's and host memory.

    Cause: `to` copies nothing where both are one device's.

    Args:
        on_host: called with each copy that goes to host memory.
    """
    original = Tensor.to

    def copy(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = original(tensor, *args, **kwargs)
        source = sys._getframe(1).f_code.co_filename
        if moved is not tensor or not source.endswith((*_COPY_IN, _COPY_OUT)):
            return moved
        moved = tensor.clone()
        if source.endswith(_COPY_OUT):
            on_host(moved)
        return moved

    setattr(Tensor, "to", copy)  # noqa: B010 - as below
    try:
        yield
    finally:
        setattr(Tensor, "to", original)  # noqa: B010


class large_on_meta(TorchFunctionMode):
    """Make large tensors without memory, while entered.

    Cause: Accelerate's `init_empty_weights` has every weight made in memory before it is moved to
    meta; the experts of one layer of a large model are more than a small machine allots.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKES_TENSORS and "device" not in kwargs:
            with torch.device("meta"):
                shadow = func(*args, **kwargs)
            if shadow.nbytes >= _LARGE_BYTES:
                return shadow
        return func(*args, **kwargs)


class without_values(TorchFunctionMode):
    """Leave new tensors without random values, while entered: nobody reads them.

    Cause: PEFT and this project draw the first values of adapters in memory, wherever the weights
    are; for many experts that takes longer than a step.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Let attention keep no scores where values are narrower than keys, while entered.

    Cause: torch's kernel for CPUs takes heads of one size only and else multiplies step by step;
    kernels for GPUs take both. Filled up with zeros, values get that of CPUs. No mode of torch is
    there when checkpointing computes again.
    """
    original = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        missing = query.shape[-1] - value.shape[-1]
        if missing <= 0:
            return original(query, key, value, *args, **kwargs)
        output = original(query, key, functional.pad(value, (0, missing)), *args, **kwargs)
        return output[..., : value.shape[-1]]

    setattr(functional, "scaled_dot_product_attention", attend)  # noqa: B010 - as below
    try:
        yield
    finally:
        setattr(functional, "scaled_dot_product_attention", original)  # noqa: B010


@contextmanager
def no_launches() -> Iterator[None]:
    """Let every launch of an interpreted Triton kernel return at once, while entered.

    Cause: Triton 3.9 knows no fake tensors; its interpreter copies what it is given to real memory.
    What surrounds a launch (outputs, workspaces, what is kept for the backward pass) runs as it is.
    The process must have been started with TRITON_INTERPRET=1.

    Raises:
        ImportError: Triton is not installed.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = original


@contextmanager
def one_example_a_row() -> Iterator[None]:
    """Have transformers make no mask for a row of one example, as with real tensors.

    Cause: transformers 5.23 looks at the positions for the start of another example, cannot see
    fake ones, and takes them for any number of examples.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices

    def find_none(position_ids: Tensor) -> None:
        """Find no start of another example."""

    masking_utils.find_packed_sequence_indices = find_none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def shape_grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return an empty result: each group of rows times its matrix, or a product for each group.

    Cause: the fake of torch 2.13's `grouped_mm` takes bf16 only, unlike the operator itself.
    """
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offsets), left.shape[0], right.shape[1])


@contextmanager
def watch_resizes(on_resize: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `on_resize` after each resize of a storage.

    Cause: no dispatch mode of torch 2.13 sees `UntypedStorage.resize_`, by which FSDP frees what it
    has gathered.
    """
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        original(storage, size)
        on_resize(storage)

    setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010 - a method, to a type checker
    try:
        yield
    finally:
        setattr(torch.UntypedStorage, "resize_", original)  # noqa: B010
