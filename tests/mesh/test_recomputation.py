"""What a checkpointed call keeps is its own: no other call, failed one or evaluation gives it."""

from functools import partial
from itertools import count

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megablocks_utils.mesh.recomputation import keep, keep_rows, recomputation_contexts


class Layer:
    """Multiplies by a number and by rows that are new each time they are made."""

    def __init__(self, *, keeps_rows: bool) -> None:
        self.numbers, self.rows = count(2), count(10)
        self.context_fn = partial(recomputation_contexts, keeps_rows=keeps_rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.forward, x, use_reentrant=False, context_fn=self.context_fn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = keep(lambda: torch.tensor(float(next(self.numbers))))
        rows = keep_rows(lambda: torch.tensor(float(next(self.rows))))
        if x.isnan():
            raise ValueError("no number")
        return (x * number).exp() * rows

    def made(self) -> tuple[int, int]:
        """Return how many numbers and rows were made."""
        return next(self.numbers) - 2, next(self.rows) - 10


def leaf(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def slope(x: torch.Tensor, number: int, rows: int) -> torch.Tensor:
    return (number * x.double()).exp() * number * rows


@pytest.mark.parametrize("keeps_rows", [True, False])
def test_every_call_finds_what_it_made(keeps_rows):
    """Two forward passes before two backward passes; between them one that fails, and one more."""
    layer = Layer(keeps_rows=keeps_rows)
    first, second = leaf(0.1), leaf(0.2)
    outputs = [layer(first), layer(second)]
    with pytest.raises(ValueError, match="no number"):
        layer(leaf(float("nan")))
    with torch.no_grad():
        assert layer(first) == (first * 5).exp() * 13  # an evaluation makes its own
    for output in outputs:
        output.backward()
    assert layer.made() == (4, 4 if keeps_rows else 6)
    seconds = (10, 11) if keeps_rows else (14, 15)
    for x, number, rows in zip((first, second), (2, 3), seconds, strict=True):
        torch.testing.assert_close(x.grad.double(), slope(x.detach(), number, rows))


def test_a_failed_recomputation_leaves_nothing_behind():
    layer = Layer(keeps_rows=True)
    x = leaf(0.1)
    outer = x * 1
    output = layer(outer)
    outer.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="no number"):
        output.backward()
    assert keep(lambda: "made") == "made"


def test_a_second_backward_pass_repeats_or_is_refused():
    x = leaf(0.1)
    output = Layer(keeps_rows=False)(x)
    for _ in range(2):
        (grad,) = torch.autograd.grad(output, x, retain_graph=True)
        assert grad.isfinite()
    output = Layer(keeps_rows=True)(x)
    torch.autograd.grad(output, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        torch.autograd.grad(output, x)


def test_what_is_kept_must_not_change():
    index = torch.tensor([1, 2])

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * keep(lambda: index).sum()

    context_fn = partial(recomputation_contexts, keeps_rows=False)
    output = checkpoint(forward, leaf(0.1), use_reentrant=False, context_fn=context_fn)
    index.add_(1)
    with pytest.raises(RuntimeError, match="was changed"):
        output.backward()
