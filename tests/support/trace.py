"""What a training run did, step by step, and how far two runs are apart."""

from dataclasses import dataclass, field

from torch import Tensor

from tests.support.compare import relative_error


@dataclass
class Trace:
    """Everything about a run that parity is judged by.

    Attributes:
        losses: loss of each step.
        grad_norms: global norm of each step's gradient before clipping.
        learning_rates: rate of each step.
        first_gradients: by parameter, the whole gradient that the first optimizer step was given
            (clipped); only on rank 0.
        weights: by parameter, the whole tensor after the last step; only on rank 0.
        stored_weights: the same by PEFT's names and in its form; only of the reference.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    stored_weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Distance:
    """Worst relative differences of two runs: over steps, or over parameters (relative norm)."""

    loss: float
    grad_norm: float
    first_gradient: float
    weight: float
    worst_gradient_name: str
    worst_weight_name: str

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.loss, self.grad_norm, self.first_gradient, self.weight)


def measure_distance(seen: Trace, wanted: Trace) -> Distance:
    """Compare a run with the reference; steps, parameters and learning rates must be the same.

    Raises:
        AssertionError: the runs do not have the same steps or parameters.
    """
    assert len(seen.losses) == len(wanted.losses)
    assert seen.learning_rates == wanted.learning_rates
    gradient, gradient_name = _worst_tensor(seen.first_gradients, wanted.first_gradients)
    weight, weight_name = _worst_tensor(seen.weights, wanted.weights)
    return Distance(
        loss=_worst_number(seen.losses, wanted.losses),
        grad_norm=_worst_number(seen.grad_norms, wanted.grad_norms),
        first_gradient=gradient,
        weight=weight,
        worst_gradient_name=gradient_name,
        worst_weight_name=weight_name,
    )


def measure_excess(seen: Trace, stock: Trace, exact: Trace, *, floor: float) -> float:
    """Return by which factor a final weight's error is at most larger than stock's own in fp32.

    Errors are relative norms from fp64; up to `floor` any error is stock's. Adam divides a gradient
    by its own size: of one of 1e-7 among others of 1e-3 half is rounding, and so is then its
    weight, in any fp32 run.
    """
    return max(
        relative_error(seen.weights[name], weight)
        / max(relative_error(stock.weights[name], weight), floor)
        for name, weight in exact.weights.items()
    )


def _worst_number(seen: list[float], wanted: list[float]) -> float:
    return max(abs(s - w) / abs(w) for s, w in zip(seen, wanted, strict=True))


def _worst_tensor(seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    assert sorted(seen) == sorted(wanted)
    return max((relative_error(seen[name], wanted[name]), name) for name in wanted)


def measure_drift(seen: Trace, wanted: Trace) -> float:
    """Return the root of the mean squared difference of the step losses."""
    squares = [(s - w) ** 2 for s, w in zip(seen.losses, wanted.losses, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5
