"""Does a backend compute on these weights what `eager` computes? Asked before the first step.

Random tokens go forward and backward through the first two experts of a rank: once with the backend
and twice with `eager`, in the dtype of compute and in a more precise one. Both are compared with
the precise result, tensor by tensor, as relative norms. What `eager` is off by is what rounding
does to a right answer on these weights; a backend may be off by twice that.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.gate import Clamp, KnownGate
from megablocks_utils.kernels.probing.probe_sample import (
    Sample,
    as_leaf,
    draw_samples,
    take_experts,
)
from megablocks_utils.kernels.shapes import name_dtype
from megablocks_utils.kernels.weights import ExpertWeights

__all__ = ["Deviation", "find_unprobed_reason", "probe_backend"]

TOLERANCE = 2.0
_SEED = 5
_FALLBACKS = ("eager", "grouped_mm")

# Exact enough: rounds 2^29, 2^16 and 2^13 times finer, and costs no more than it must. (fp64 for
# all would take twice the memory, and many GPUs run it at 1/32 of the speed of fp32.)
_PRECISE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Deviation:
    """Say how far a tensor of the backend is from the precise result.

    Attributes:
        tensor: `output`, or `gradient of` what.
        error: relative norm of the difference; absolute where the precise result is all zero.
        rounding: the same of `eager`, with a margin where it is the norm of few numbers; or, if
            that is more, what another order of summing may do, or a limit that rounding moves.
    """

    tensor: str
    error: float
    rounding: float

    @property
    def ratio(self) -> float:
        """The error in units of rounding; infinite for one that is not finite."""
        if self.error == 0:
            return 0.0
        is_number = math.isfinite(self.error) and self.rounding > 0
        return self.error / self.rounding if is_number else math.inf


def find_unprobed_reason(name: str, dtype: torch.dtype) -> str | None:
    """Say in a clause why a backend is not probed in a dtype, or return None."""
    if name == "eager":
        return "eager is what other kernels are compared with"
    if dtype not in _PRECISE:
        return f"there is nothing more precise than {name_dtype(dtype)} to compare with"
    return None


def probe_backend(
    name: str,
    run: ExpertBackend,
    experts: ExpertWeights,
    dtype: torch.dtype,
    *,
    is_weighted: bool,
) -> Deviation:
    """Compare a backend with `eager`: output and every gradient; return what was farthest off.

    Two routings: tokens spread over both experts, and all of them on the second one. (Some expert
    has no token in most batches; its gradients must be zeros and not whatever lay in memory, which
    only the real device can show.)

    Nothing of the user's changes: weights are taken as views, adapters are replaced by random ones
    (B starts at zero, which would make every gradient of A zero), and random numbers come from a
    generator of its own. A tensor of which `eager` itself is not finite in `dtype` is left out: it
    says nothing of the backend.

    Args:
        name: of the backend.
        run: the backend.
        experts: of this rank, in any dtype; `requires_grad` says which gradients are wanted.
        dtype: of compute, one that `find_unprobed_reason` does not refuse.
        is_weighted: whether the backend weights its results, each token with up to two experts; or
            runs rows that came from other ranks, with one expert each.

    Raises:
        ConfigurationError: a tensor is off by more than twice what rounding explains.
        CheckpointError: weights that are not finite.
    """
    generator = torch.Generator().manual_seed(_SEED)
    experts = take_experts(experts, dtype, generator)
    _check_weights(name, experts)
    samples = draw_samples(experts, generator, is_weighted=is_weighted)
    found = [deviation for sample in samples for deviation in _compare(run, experts, sample)]
    worst = max(found, key=lambda deviation: deviation.ratio, default=Deviation("output", 0.0, 0.0))
    if worst.ratio > TOLERANCE:
        raise ConfigurationError(_describe_failure(name, worst, dtype), parameters=("kernel",))
    return worst


def _compare(run: ExpertBackend, experts: ExpertWeights, sample: Sample) -> list[Deviation]:
    """Return how far off every tensor is of which `eager` is finite."""
    dtype = _PRECISE[sample.tokens.dtype]
    precise = experts.map_tensors(lambda tensor: as_leaf(tensor, dtype))
    exact = _run_eager(precise, sample.to(dtype))
    floor = _summation_error(experts)
    least = {name: floor if wanted.any() else 0.0 for name, wanted in exact.items()}
    for moved in _move_limit(precise, sample.tokens.dtype):
        shifts = _measure_errors(_run_eager(moved, sample.to(dtype)), exact)
        least = {name: max(error, shifts[name]) for name, error in least.items()}
    del precise
    own = _measure_errors(_run_eager(experts, sample), exact)
    errors = _measure_errors(_run(run, experts, sample), exact)
    return [
        Deviation(name, errors[name], max(own[name] * _uncertainty(wanted), least[name]))
        for name, wanted in exact.items()
        if math.isfinite(own[name])
    ]


def _move_limit(experts: ExpertWeights, dtype: torch.dtype) -> Iterator[ExpertWeights]:
    """Yield experts whose clamped gate has its limit one unit of the last place lower, and higher.

    A gate's slope ends at its limit. Whether a value beside it is clamped is a matter of rounding,
    and one such value is much in a gradient: of two right answers one was seen 12 times as far off
    as the other.
    """
    gate = experts.gate
    if isinstance(gate, KnownGate) and gate.clamp is not Clamp.NONE:
        for shift in (-1, 1):
            limit = gate.limit * (1 + shift * torch.finfo(dtype).eps)
            yield replace(experts, gate=replace(gate, limit=limit))


def _check_weights(name: str, experts: ExpertWeights) -> None:
    for tensor_name, tensor in experts.tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{tensor_name} of the first experts holds values that are not finite in "
                f"{name_dtype(tensor.dtype)}, so kernel {name} cannot be checked and nothing can "
                "be trained: the model or checkpoint that it came from is damaged.",
                parameters=("kernel",),
            )


def _run_eager(experts: ExpertWeights, sample: Sample) -> dict[str, Tensor]:
    """Return the output and every gradient that is wanted: `eager` makes all of them."""
    found = _run(run_experts_eager, experts, sample)
    made = {name: tensor for name, tensor in found.items() if tensor is not None}
    assert made.keys() == found.keys(), found.keys() - made.keys()
    return made


def _run(run: ExpertBackend, experts: ExpertWeights, sample: Sample) -> dict[str, Tensor | None]:
    """Return the output and every gradient that is wanted, by name."""
    tokens = sample.tokens.clone().requires_grad_()
    leaves = {"tokens": tokens}
    top_k_weights = sample.top_k_weights
    if top_k_weights is not None:
        top_k_weights = leaves["top_k_weights"] = top_k_weights.clone().requires_grad_()
    leaves |= {name: leaf for name, leaf in experts.tensors.items() if leaf.requires_grad}
    with torch.enable_grad():
        output = run(tokens, sample.order, top_k_weights, experts)
        # A scalar, since autograd imports sympy (seconds) to check the shape of anything else.
        objective = (output * sample.upstream).sum()
    grads = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    found: dict[str, Tensor | None] = {"output": output.detach()}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _measure_errors(
    seen: Mapping[str, Tensor | None], exact: Mapping[str, Tensor]
) -> dict[str, float]:
    return {name: _relative_error(seen[name], wanted) for name, wanted in exact.items()}


def _relative_error(seen: Tensor | None, exact: Tensor) -> float:
    """Return ||seen - exact|| / ||exact||, or ||seen|| where `exact` is all zero.

    A gradient that is None counts as zeros.
    """
    difference = exact if seen is None else seen - exact
    scale = torch.linalg.vector_norm(exact).item()
    return torch.linalg.vector_norm(difference).item() / (scale or 1.0)


def _summation_error(experts: ExpertWeights) -> float:
    """Return the relative error that comes of summing in fp32 one product after the other.

    2^-26 * sqrt(n) for n products (measured for n from 64 to 14336), and up to three such sums
    follow one another. A library that sums in blocks is off by less in long sums, which is nothing
    to hold against a kernel that does not. Only in fp32 can this be more than what `eager` is off.
    """
    return 2**-25 * math.sqrt(max(experts.gate_up_proj.shape[1:]))


def _uncertainty(tensor: Tensor) -> float:
    """Return how much larger than seen an error may usually be.

    The norm of n random errors varies by 1 / sqrt(2 * n), so the ratio of two norms by
    1 / sqrt(n); four times that is rare enough. It matters for routing weights alone, 64 numbers.
    """
    return 1 + 4 / math.sqrt(tensor.numel())


def _describe_failure(name: str, worst: Deviation, dtype: torch.dtype) -> str:
    works = " or ".join(f"kernel {other}" for other in _FALLBACKS if other != name)
    seen = "not finite where that of eager is"
    if math.isfinite(worst.error):
        seen = (
            f"off by {worst.error:.1e}, more than {TOLERANCE:g} times the {worst.rounding:.1e} "
            f"that rounding to {name_dtype(dtype)} explains"
        )
    return (
        f"kernel {name} fails its check on this model's weights: its {worst.tensor} is {seen}; "
        f"nothing was trained, use {works}."
    )
