"""What a checkpointed layer keeps of its forward pass, so that recomputing it repeats no exchange.

torch's selective checkpointing would find these few results by looking at every operator of the
layer, twice, which takes a CPU longer than the operator itself; here whoever makes a result says
that it is to be kept. Each call of a checkpointed layer keeps its own: several may wait for their
backward passes, and one that fails leaves nothing behind.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Protocol, TypeVar, cast

from torch import Tensor

__all__ = ["keep", "keep_rows", "recomputation_contexts"]

_Kept = TypeVar("_Kept")


def keep(make: Callable[[], _Kept]) -> _Kept:
    """Return what `make` returns; while a layer is recomputed, what it returned the first time."""
    call = _current_pass.get()
    return make() if call is None else cast("_Kept", call.keep(make))


def keep_rows(make: Callable[[], Tensor]) -> Tensor:
    """Do the same with a large result, where checkpointing is to keep those too.

    It is let go when it is used again: the backward pass frees it as soon as it can.
    """
    call = _current_pass.get()
    return make() if call is None else call.keep_rows(make)


def recomputation_contexts(
    *, keeps_rows: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first pass and of the recomputation of one checkpointed call.

    It is what `torch.utils.checkpoint` wants of a `context_fn`.

    Args:
        keeps_rows: whether the results of `keep_rows` are kept, or made again.
    """
    results: list[_Result] = []
    return (
        _Entered(lambda: _FirstPass(results, keeps_rows)),
        _Entered(lambda: _Recomputation(results, keeps_rows)),
    )


class _Result:
    """A kept result; a tensor of it must not be changed in place."""

    def __init__(self, value: object) -> None:
        self._value = value
        self._version = _version(value)

    def read(self) -> object:
        """Return it.

        Raises:
            RuntimeError: it was changed, or let go.
        """
        if self._value is None:
            raise RuntimeError(
                "The backward pass of a checkpointed layer ran twice, but with "
                "gradient_checkpointing selective it can run once."
            )
        if _version(self._value) != self._version:
            raise RuntimeError("What a checkpointed layer keeps was changed before its backward.")
        return self._value

    def let_go(self) -> None:
        """Free it."""
        self._value = None


def _version(value: object) -> int | None:
    return value._version if isinstance(value, Tensor) else None


class _Pass(Protocol):
    def keep(self, make: Callable[[], object]) -> object: ...

    def keep_rows(self, make: Callable[[], Tensor]) -> Tensor: ...


class _FirstPass:
    """Notes results in the order in which they are made."""

    def __init__(self, results: list[_Result], keeps_rows: bool) -> None:
        self._results = results
        self._keeps_rows = keeps_rows

    def keep(self, make: Callable[[], object]) -> object:
        made = make()
        self._results.append(_Result(made))
        return made

    def keep_rows(self, make: Callable[[], Tensor]) -> Tensor:
        rows = make()
        if self._keeps_rows:
            # Without what autograd will know of it.
            self._results.append(_Result(rows.detach()))
        return rows


class _Recomputation:
    """Gives them out in the same order."""

    def __init__(self, results: list[_Result], keeps_rows: bool) -> None:
        self._results = iter(results)
        self._keeps_rows = keeps_rows

    def keep(self, make: Callable[[], object]) -> object:
        return self._next().read()

    def keep_rows(self, make: Callable[[], Tensor]) -> Tensor:
        if not self._keeps_rows:
            return make()
        result = self._next()
        rows = cast("Tensor", result.read())
        result.let_go()
        return rows

    def _next(self) -> _Result:
        result = next(self._results, None)
        if result is None:
            raise RuntimeError("A checkpointed layer makes more when it is recomputed.")
        return result


class _Entered(AbstractContextManager[None]):
    """Makes a pass the current one of this thread while entered; may be entered again."""

    def __init__(self, start: Callable[[], _Pass]) -> None:
        self._start = start
        self._tokens: list[Token[_Pass | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_current_pass.set(self._start()))

    def __exit__(self, *_: object) -> None:
        _current_pass.reset(self._tokens.pop())


# Autograd runs recomputations in threads of its own on a GPU; each has a value of its own.
_current_pass: ContextVar[_Pass | None] = ContextVar("_current_pass", default=None)
