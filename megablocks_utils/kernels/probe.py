"""Does a backend compute on these weights what `eager` computes? Asked before the first step.

Random tokens go forward and backward through the first two experts of a rank: once with the backend
and twice with `eager`, in the dtype of compute and in a more precise one. Both are compared with
the precise result, tensor by tensor, as relative norms. What `eager` is off by is what rounding
does to a right answer on these weights; a backend may be off by twice that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.kernels.backend import ExpertBackend
from megablocks_utils.kernels.eager import run_experts_eager
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank

__all__ = ["Deviation", "find_probe_obstacle", "probe_backend"]

NUM_TOKENS = 32
MAX_EXPERTS = 2
"""Two, so that one could be taken for the other; no more, so that large experts fit beside all."""

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
        rounding: the same of `eager`, or what another order of summing may do if that is more.
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


@dataclass(frozen=True)
class _Sample:
    """Tokens, how they are routed, and the gradient of their results."""

    tokens: Tensor
    order: ExpertOrder
    top_k_weights: Tensor | None
    upstream: Tensor

    def to(self, dtype: torch.dtype) -> "_Sample":
        """Return the same numbers in a more precise dtype."""
        weights = None if self.top_k_weights is None else self.top_k_weights.to(dtype)
        return replace(
            self,
            tokens=self.tokens.to(dtype),
            top_k_weights=weights,
            upstream=self.upstream.to(dtype),
        )


def find_probe_obstacle(name: str, dtype: torch.dtype) -> str | None:
    """Say in a clause why a backend is not probed in a dtype, or return None."""
    if name == "eager":
        return "eager is what other kernels are compared with"
    if dtype not in _PRECISE:
        return f"there is nothing more precise than {_name(dtype)} to compare with"
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
        name: of the backend, as `--kernel` has it.
        run: the backend.
        experts: of this rank, in any dtype; `requires_grad` says which gradients are wanted.
        dtype: of compute, one that `find_probe_obstacle` does not refuse.
        is_weighted: whether the backend weights its results, each token with up to two experts; or
            runs rows that came from other ranks, with one expert each.

    Raises:
        ConfigurationError: a tensor is off by more than twice what rounding explains.
        CheckpointError: weights that are not finite.
    """
    generator = torch.Generator().manual_seed(_SEED)
    experts = _take_experts(experts, dtype, generator)
    _check_weights(name, experts)
    samples = _draw_samples(experts, generator, is_weighted=is_weighted)
    found = [deviation for sample in samples for deviation in _compare(run, experts, sample)]
    worst = max(found, key=lambda deviation: deviation.ratio, default=Deviation("output", 0.0, 0.0))
    if worst.ratio > TOLERANCE:
        raise ConfigurationError(_describe_failure(name, worst, dtype))
    return worst


def _compare(run: ExpertBackend, experts: ExpertWeights, sample: _Sample) -> list[Deviation]:
    """Return how far off every tensor is of which `eager` is finite."""
    dtype = _PRECISE[sample.tokens.dtype]
    precise = experts.map_tensors(lambda tensor: _as_leaf(tensor, dtype))
    exact = _run(run_experts_eager, precise, sample.to(dtype))
    del precise
    own = _measure_errors(_run(run_experts_eager, experts, sample), exact)
    errors = _measure_errors(_run(run, experts, sample), exact)
    floor = _summation_error(experts)
    return [
        Deviation(name, errors[name], max(own[name], floor) if wanted.any() else own[name])
        for name, wanted in exact.items()
        if math.isfinite(own[name])
    ]


def _take_experts(
    experts: ExpertWeights, dtype: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    """Return the first experts as leaves of their own, with random adapters."""
    taken = experts.map_tensors(lambda tensor: _as_leaf(tensor[:MAX_EXPERTS], dtype))
    gate_up, down = taken.projections
    return replace(
        taken,
        gate_up_lora=taken.gate_up_lora and _draw_adapter(taken.gate_up_lora, gate_up, generator),
        down_lora=taken.down_lora and _draw_adapter(taken.down_lora, down, generator),
    )


def _as_leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor cut off from its graph; a view of it unless it has another dtype."""
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _draw_adapter(lora: LowRank, weights: Tensor, generator: torch.Generator) -> LowRank:
    """Return a random adapter that adds about as much as the weights (L, out, in) give."""
    rank, num_in = lora.lora_a.shape[1:]
    size = torch.linalg.vector_norm(weights.detach(), dtype=torch.float32).item()
    size = size / math.sqrt(weights.numel()) or 1.0
    scales = num_in**-0.5, size * math.sqrt(num_in / rank) / lora.scaling

    def draw(like: Tensor, scale: float) -> Tensor:
        return _draw(like.shape, like, generator, scale).requires_grad_(like.requires_grad)

    return replace(lora, lora_a=draw(lora.lora_a, scales[0]), lora_b=draw(lora.lora_b, scales[1]))


def _draw(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Draw on the CPU, so that the numbers are the same for every device."""
    return (torch.randn(shape, generator=generator) * scale).to(like)


def _check_weights(name: str, experts: ExpertWeights) -> None:
    for tensor_name, tensor in experts.tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{tensor_name} of the first experts holds values that are not finite in "
                f"{_name(tensor.dtype)}, so --kernel {name} cannot be checked and nothing can be "
                "trained: the model or checkpoint that it came from is damaged."
            )


def _draw_samples(
    experts: ExpertWeights, generator: torch.Generator, *, is_weighted: bool
) -> Iterator[_Sample]:
    """Yield tokens spread over the experts, then the same tokens all on the last one."""
    num_experts, like = experts.down_proj.shape[0], experts.down_proj
    hidden_size = experts.projections[1].shape[1]
    tokens, upstream = (_draw((NUM_TOKENS, hidden_size), like, generator) for _ in range(2))
    spread = _draw_routing(num_experts, num_experts if is_weighted else 1, generator)
    weights = None
    if is_weighted:
        weights = torch.rand(spread.shape, generator=generator).to(like.device) + 0.1
    routings = [spread] if num_experts == 1 else [spread, torch.full_like(spread, num_experts - 1)]
    for index in routings:
        order = sort_by_expert(index.to(like.device), num_experts)
        if not is_weighted and num_experts == 1:
            order = replace(order, order=None, inverse=None)  # rows arrive sorted
        yield _Sample(tokens, order, weights, upstream)


def _draw_routing(num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Return (T, K) experts, three sevenths of the rows on the first of two.

    27 of 64 or 13 of 32: no count is a multiple of a kernel's tile, which would leave its masks
    untried. So some tokens have the same expert twice.
    """
    rows = torch.randperm(NUM_TOKENS * top_k, generator=generator)
    on_first = len(rows) * 3 // 7 if num_experts > 1 else len(rows)
    return (rows >= on_first).long().view(NUM_TOKENS, top_k)


def _run(run: ExpertBackend, experts: ExpertWeights, sample: _Sample) -> dict[str, Tensor | None]:
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
    named = zip(leaves, grads, strict=True)
    return {"output": output.detach()} | {f"gradient of {name}": grad for name, grad in named}


def _measure_errors(seen: dict[str, Tensor | None], exact: dict[str, Tensor]) -> dict[str, float]:
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


def _describe_failure(name: str, worst: Deviation, dtype: torch.dtype) -> str:
    works = " or ".join(f"--kernel {other}" for other in _FALLBACKS if other != name)
    seen = (
        f"its {worst.tensor} is off by {worst.error:.1e}"
        if math.isfinite(worst.error)
        else f"its {worst.tensor} is not finite"
    )
    return (
        f"--kernel {name} fails its check on this model's weights: {seen}, but may be off by "
        f"{TOLERANCE:g} times the {worst.rounding:.1e} that rounding to {_name(dtype)} explains; "
        f"nothing was trained, use {works}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
