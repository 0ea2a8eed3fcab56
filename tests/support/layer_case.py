"""One layer of experts to run through a backend: what is drawn, what is trained, its bounds."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.fused.tile import Tile, TileTable
from megablocks_utils.kernels.gate import SWIGLU, KnownActivation, KnownGate
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.quantization.packing import pack_all
from tests.support.compare import relative_error

SCALING = 0.5
# Small and of unequal sides, so that small layers cross tiles and sides that are swapped are seen.
_SMALL = Tile(16, 32, 16, num_warps=4, num_stages=1)
SMALL_TILES = TileTable(
    _SMALL, _SMALL, Tile(16, 16, 32, 4, 1), _SMALL, weight_grad=Tile(32, 32, 16, 4, 1)
)
PROJECTIONS = ("gate_up_proj", "down_proj")
ADAPTERS = tuple(f"{name}.lora_{side}" for name in PROJECTIONS for side in "AB")
BIASES = tuple(f"{name}_bias" for name in PROJECTIONS)


@dataclass(frozen=True)
class LayerCase:
    """Sizes and kind of a layer, as a test names it; drawn in fp64, always the same.

    Attributes:
        rank: of adapters on both projections; 0 is none.
        routing: `skewed` leaves the last expert without rows and gives the first more than others;
            `one expert`; `same twice` sends every token to one expert with all its slots.
        gate: of the experts; `KnownActivation` is experts without one.
        is_received: rows of other ranks, as under expert parallelism: K = 1, no weights, sorted.
        frozen: names of what has no gradient.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int = 3
    top_k: int = 2
    rank: int = 0
    routing: str = "skewed"
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    gate: KnownGate | KnownActivation = SWIGLU
    is_received: bool = False
    frozen: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """F: of the first projection."""
        return self.intermediate_size * (2 if isinstance(self.gate, KnownGate) else 1)

    def draw_index(self) -> Tensor:
        """Return the experts (T, K) of every token."""
        generator = torch.Generator().manual_seed(1)
        shape = self.num_tokens, self.num_experts
        if self.routing == "one expert":
            return torch.full((self.num_tokens, self.top_k), self.num_experts // 2)
        if self.routing == "same twice":
            index = torch.randint(self.num_experts, (self.num_tokens, 1), generator=generator)
            return index.expand(-1, self.top_k).contiguous()
        scores = torch.rand(shape, generator=generator)
        scores[:, 0] += 0.3
        if self.top_k < self.num_experts:
            scores[:, -1] = -1.0
        return scores.argsort(dim=-1, descending=True)[:, : self.top_k]

    def draw_leaves(self) -> dict[str, Tensor]:
        """Return tokens, routing weights and all parameters by name."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        leaves = {"tokens": draw(self.num_tokens, self.hidden_size)}
        if not self.is_received:
            leaves["top_k_weights"] = draw(self.num_tokens, self.top_k).softmax(dim=-1)
        sizes = (
            (self.num_outputs, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        )
        for name, (num_out, num_in) in zip(PROJECTIONS, sizes, strict=True):
            weight = draw(self.num_experts, num_out, num_in, scale=num_in**-0.5)
            leaves[name] = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            if self.has_bias:
                leaves[f"{name}_bias"] = draw(self.num_experts, num_out, scale=0.5)
            if self.rank:
                leaves[f"{name}.lora_A"] = draw(self.num_experts, self.rank, num_in, scale=0.3)
                leaves[f"{name}.lora_B"] = draw(self.num_experts, num_out, self.rank, scale=0.3)
        return leaves

    def build_experts(self, leaves: dict[str, Tensor]) -> ExpertWeights:
        """Put parameters together."""
        loras = [
            LowRank(leaves[f"{name}.lora_A"], leaves[f"{name}.lora_B"], SCALING)
            if self.rank
            else None
            for name in PROJECTIONS
        ]
        return ExpertWeights(
            leaves["gate_up_proj"],
            leaves["down_proj"],
            self.gate,
            *loras,
            leaves.get("gate_up_proj_bias"),
            leaves.get("down_proj_bias"),
            self.is_transposed,
            self.is_interleaved,
            has_gate=isinstance(self.gate, KnownGate),
        )

    def build_order(self, device: str = "cpu") -> ExpertOrder:
        """Sort the rows by expert, or say that they are."""
        order = sort_by_expert(self.draw_index().to(device), self.num_experts)
        if self.is_received:
            assert self.top_k == 1
            return ExpertOrder(None, None, order.tokens_per_expert, top_k=1)
        return order


@dataclass(frozen=True)
class LayerRun:
    """A case in a dtype: leaves of its own, and everything that a backend takes."""

    case: LayerCase
    leaves: dict[str, Tensor]
    order: ExpertOrder
    experts: ExpertWeights
    upstream: Tensor

    def forward(self, run: ExpertBackend) -> Tensor:
        """Return the output (T, H)."""
        weights = self.leaves.get("top_k_weights")
        return run(self.leaves["tokens"], self.order, weights, self.experts)

    def results(self, run: ExpertBackend) -> dict[str, Tensor]:
        """Return the output and the gradient of everything that is not frozen."""
        output = self.forward(run)
        trained = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(output, list(trained.values()), self.upstream)
        return {"output": output.detach(), **dict(zip(trained, grads, strict=True))}


def prepare(case: LayerCase, dtype: torch.dtype, device: str = "cpu") -> LayerRun:
    """Make leaves in a dtype on a device."""
    leaves = {
        name: leaf.to(device, dtype, copy=True).requires_grad_(name not in case.frozen)
        for name, leaf in case.draw_leaves().items()
    }
    generator = torch.Generator().manual_seed(2)
    shape = case.num_tokens, case.hidden_size
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return LayerRun(case, leaves, case.build_order(device), case.build_experts(leaves), upstream)


def pack_projections(run: LayerRun, name: str) -> tuple[ExpertWeights, ExpertWeights]:
    """Return a run's experts packed in a format, and with the numbers that they stand for then."""
    dtype = run.leaves["tokens"].dtype
    gate_up, down = (
        pack_all(name, run.leaves[p], is_transposed=run.case.is_transposed).in_dtype(dtype)
        for p in PROJECTIONS
    )
    plain = [packed.dequantize_some(0, len(packed)) for packed in (gate_up, down)]
    experts = run.experts
    return (
        replace(experts, gate_up_proj=gate_up, down_proj=down),
        replace(experts, gate_up_proj=plain[0], down_proj=plain[1]),
    )


def run_case(
    case: LayerCase, run: ExpertBackend, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Return the output and the gradient of everything that is not frozen, on the CPU."""
    results = prepare(case, dtype, device).results(run)
    return {name: tensor.cpu() for name, tensor in results.items()}


def obvious_experts(case: LayerCase) -> ExpertBackend:
    """Return the layer without sorting and without adapters: every expert on every token."""
    index = case.draw_index()
    if case.is_received:
        index = index.sort(dim=0).values

    def run(tokens, _order, top_k_weights, experts):
        gate_up, down = (
            weight if lora is None else weight + lora.scaling * lora.lora_b @ lora.lora_a
            for weight, lora in zip(
                experts.projections, (experts.gate_up_lora, experts.down_lora), strict=True
            )
        )
        output = torch.zeros_like(tokens)
        for expert in range(case.num_experts):
            hidden = tokens @ gate_up[expert].T
            if case.has_bias:
                hidden = hidden + experts.gate_up_bias[expert]
            result = experts.apply_gate(hidden) @ down[expert].T
            if case.has_bias:
                result = result + experts.down_bias[expert]
            weight = (index == expert).to(tokens.dtype)
            if top_k_weights is not None:
                weight = weight * top_k_weights
            output = output + weight.sum(dim=1, keepdim=True) * result
        return output

    return run


def assert_equals_obvious(
    case: LayerCase, run: ExpertBackend, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare output and every gradient with the obvious layer in fp64.

    The bound of each is twice the error of `eager` in this dtype. That of a tensor of few numbers
    may be small by luck, so it is taken as at least that of the output, a sum like all the others,
    with room for what the norm of n random numbers varies by (as in `kernels.probing`).
    """
    exact = run_case(case, obvious_experts(case), torch.float64)
    own = run_case(case, run_experts_eager, dtype, device)
    seen = run_case(case, run, dtype, device)
    assert seen.keys() == exact.keys()
    for name, wanted in exact.items():
        assert (seen[name].shape, seen[name].dtype) == (wanted.shape, dtype), name
        largest = max(relative_error(own[key], exact[key]) for key in (name, "output"))
        bound = 2 * largest * (1 + 4 / max(1, wanted.numel()) ** 0.5)
        error = relative_error(seen[name], wanted)
        assert error <= bound, f"{name}: {error:.1e} of at most {bound:.1e}"
