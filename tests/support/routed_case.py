"""Tokens routed to experts, run through a backend and through a slow reference."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.moe.reference import experts_reference
from tests.support.compare import relative_error


@dataclass(frozen=True)
class RoutedCase:
    """Drawn in fp32.

    Attributes:
        index: (T, K) expert of each token's slots.
        leaves: tokens and the fields of `ExpertWeights`; `top_k_weights` where they are given.
        upstream: (T, H) gradient of the output.
        is_sorted: whether tokens lie in expert order, and are given so.
        storage: flags of `ExpertWeights`.
    """

    index: Tensor
    leaves: dict[str, Tensor]
    upstream: Tensor
    is_sorted: bool = False
    storage: dict[str, bool] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return len(self.leaves["gate_up_proj"])


def draw_case(
    index: Tensor, num_experts: int, hidden_size: int, intermediate_size: int
) -> RoutedCase:
    """Draw everything but the index (T, K)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    leaves = {
        "tokens": draw(len(index), hidden_size),
        "top_k_weights": draw(*index.shape).softmax(dim=-1),
        "gate_up_proj": draw(
            num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5
        ),
        "down_proj": draw(
            num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5
        ),
    }
    return RoutedCase(index, leaves, draw(len(index), hidden_size))


def as_received(case: RoutedCase, *, is_sorted: bool) -> RoutedCase:
    """Return a case of K = 1 as expert parallelism hands it over: no routing weights."""
    leaves = {name: leaf for name, leaf in case.leaves.items() if name != "top_k_weights"}
    index = case.index.sort(dim=0).values if is_sorted else case.index
    return replace(case, index=index, leaves=leaves, is_sorted=is_sorted)


def with_storage(case: RoutedCase, **storage: bool) -> RoutedCase:
    """Return the case with biases, and weights that are stored in another way."""
    num_experts, twice_intermediate, hidden_size = case.leaves["gate_up_proj"].shape
    generator = torch.Generator().manual_seed(2)
    leaves = case.leaves | {
        "gate_up_bias": torch.randn(num_experts, twice_intermediate, generator=generator),
        "down_bias": torch.randn(num_experts, hidden_size, generator=generator),
    }
    if storage.get("is_transposed"):
        for name in ("gate_up_proj", "down_proj"):
            leaves[name] = leaves[name].transpose(1, 2).contiguous()
    return replace(case, leaves=leaves, storage=storage)


def draw_index(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Route to any experts but the last; a token may have one twice."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(max(1, num_experts - 1), (num_tokens, top_k), generator=generator)


def run_case(
    case: RoutedCase,
    run: ExpertBackend,
    dtype: torch.dtype,
    *,
    frozen: tuple[str, ...] = (),
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf that is not frozen, on the CPU."""
    leaves = {
        name: leaf.to(device, dtype, copy=True).requires_grad_(name not in frozen)
        for name, leaf in case.leaves.items()
    }
    weights = {k: v for k, v in leaves.items() if k not in ("tokens", "top_k_weights")}
    experts = ExpertWeights(**weights, gate=SWIGLU, **case.storage)
    order = sort_by_expert(case.index.to(device), case.num_experts)
    if case.is_sorted:
        order = ExpertOrder(None, None, order.tokens_per_expert, top_k=1)
    output = run(leaves["tokens"], order, leaves.get("top_k_weights"), experts)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = case.upstream.to(device, dtype)
    grads = torch.autograd.grad(output, list(trained.values()), upstream)
    return {"output": output.cpu(), **dict(zip(trained, (g.cpu() for g in grads), strict=True))}


def reference_of(case: RoutedCase) -> ExpertBackend:
    """Return the obvious layer with the call of a backend."""

    def run(tokens, _order, top_k_weights, experts):
        if top_k_weights is None:
            top_k_weights = torch.ones_like(case.index, dtype=tokens.dtype)
        return experts_reference(tokens, case.index, top_k_weights, experts)

    return run


def assert_equals_reference(
    case: RoutedCase,
    run: ExpertBackend,
    dtype: torch.dtype,
    *,
    reference: ExpertBackend | None = None,
    frozen: tuple[str, ...] = (),
    device: str = "cpu",
) -> None:
    """Compare the output and every gradient with the reference in fp64.

    The bound is twice the reference's own error in this dtype: its largest in this case, because
    that of a tensor of few numbers may be small by luck.
    """
    reference = reference or reference_of(case)
    exact = run_case(case, reference, torch.float64, frozen=frozen)
    own = run_case(case, reference, dtype, frozen=frozen)
    seen = run_case(case, run, dtype, frozen=frozen, device=device)
    bound = 2 * max(relative_error(own[name], exact[name]) for name in exact)
    assert seen.keys() == exact.keys()
    errors = {name: relative_error(seen[name], exact[name]) for name in exact}
    assert {name: (x.shape, x.dtype) for name, x in seen.items()} == {
        name: (x.shape, dtype) for name, x in exact.items()
    }
    assert {name: error for name, error in errors.items() if error > bound} == {}, bound
