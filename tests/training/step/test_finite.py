"""Looking at weights: all of them where it is cheap or needed, else a share in turn."""

import pytest
import torch

from megablocks_utils.training.step import finite
from megablocks_utils.training.step.finite import FiniteCheck, largest_values


def test_extremes_that_show_what_is_not_finite():
    """An infinite value, a NaN, an empty tensor, a large finite value; on a GPU where one is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = [[1.0, -3e38], [float("nan"), 2.0], [], [0.0, float("-inf")]]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.tensor(value, device=device, dtype=dtype) for value in values]
        assert largest_values(tensors).isfinite().tolist() == [True, False, True, False]


@pytest.mark.parametrize(("is_last", "rate"), [(True, 1e-3), (False, 10.0)])
def test_every_weight_is_seen_in_turn_or_at_once(is_last, rate, monkeypatch):
    """A large model on a CPU; one weight of its last tensor is spoilt."""
    if torch.cuda.is_available():
        pytest.skip("a GPU sees all weights in every step")
    monkeypatch.setattr(finite, "_CPU_ELEMENTS", 20)
    model = torch.nn.ModuleList(torch.nn.Linear(3, 4, bias=False) for _ in range(6))
    parameters = list(model.parameters())
    check = FiniteCheck(model)
    check.take_gradients(parameters, torch.zeros(0))
    with torch.no_grad():
        parameters[-1][0, 0] = float("inf")
    seen = [int(check.count_weights(is_last=False, rate=1e-3)) for _ in range(6)]
    assert seen == [0, 0, 1, 0, 0, 1]
    assert check.count_weights(is_last=is_last, rate=rate) == 1
