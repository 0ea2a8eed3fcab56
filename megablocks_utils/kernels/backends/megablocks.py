"""Run experts through the megablocks package (Gale et al., arXiv 2211.15841), where it is built.

Its grouped dropless path: gather, grouped products, scatter, with the package's own operators and
no others. Written against megablocks 0.10.0 and grouped_gemm 0.3.0.
"""

from importlib import import_module

import torch
from torch import Tensor

from megablocks_utils.config import backends
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights

_MAX_ELEMENTS = 2**31 - 1


def run_experts_megablocks(
    tokens: Tensor, order: ExpertOrder, top_k_weights: Tensor | None, experts: ExpertWeights
) -> Tensor:
    """Gather, multiply by `gate_up_proj`, gate, multiply by `down_proj`, scatter.

    See `ExpertBackend`. The counts of rows are read back to the host once, because cuBLAS, which
    grouped_gemm calls for each expert, needs them there. Gate and up are one product, as the
    weights lie; the package's own GLU makes two. Its operators are called one by one, because its
    memory-optimized GLU refuses frozen weights. Transposed and interleaved weights are fine.

    Raises:
        ConfigurationError: the experts have adapters or biases, or there are too many rows.
    """
    num_rows = len(tokens) * order.top_k
    _check_can_run(num_rows, tokens.shape[1], experts)
    if num_rows == 0:  # cuBLAS would be handed null pointers
        return run_experts_eager(tokens, order, top_k_weights, experts)
    batch_sizes = order.tokens_per_expert.cpu()
    if order.order is None:
        return _run_experts(tokens.contiguous(), batch_sizes, experts)
    ops = import_module("megablocks.ops")
    indices, bin_ids, bins = _describe_order(order.order, order.tokens_per_expert)
    rows = ops.gather(tokens.contiguous(), indices, bin_ids, bins, order.top_k)
    rows = _run_experts(rows, batch_sizes, experts)
    if top_k_weights is None:
        return ops.scatter(rows, indices, bin_ids, None, bins, order.top_k)
    weights = top_k_weights.reshape(-1).contiguous()
    output = ops.scatter(rows, indices, bin_ids, weights, bins, order.top_k)
    # With K = 1 it is a view: FSDP2 warns of those, and adding to one in place raises.
    return output.clone() if order.top_k == 1 else output


def _check_can_run(num_rows: int, hidden_size: int, experts: ExpertWeights) -> None:
    """Refuse what the package has not, or would compute wrongly without a word."""
    MEGABLOCKS.refuse_unsupported(experts)
    if num_rows * hidden_size > _MAX_ELEMENTS:
        raise ConfigurationError(
            f"kernel is megablocks, which counts in 32 bits, but {num_rows} rows of "
            f"{hidden_size} have more than {_MAX_ELEMENTS} elements; kernel triton counts in 64.",
            parameters=("kernel",),
        )


def _describe_order(order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return routed row (N,) and expert (N,) of each sorted row, and each expert's end (L,).

    The package's `indices`, `bin_ids` and `bins`. In 32 bits, as it makes them: its kernels do not
    compile with 64.
    """
    experts = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    bin_ids = experts.repeat_interleave(counts, output_size=len(order))
    return order.int(), bin_ids, counts.cumsum(0, dtype=torch.int32)


def _run_experts(rows: Tensor, batch_sizes: Tensor, experts: ExpertWeights) -> Tensor:
    """Run sorted rows (N, H) through their experts; `batch_sizes` (L,) int64 is on the host.

    grouped_gemm does not look at the strides of its first operand in backward.
    """
    gmm, trans_b = import_module("grouped_gemm.ops").gmm, not experts.is_transposed
    gate_up_out = gmm(rows, experts.gate_up_proj, batch_sizes, trans_b)
    activations = experts.apply_gate(gate_up_out).contiguous()
    return gmm(activations, experts.down_proj, batch_sizes, trans_b)


# A build of the packages without CUDA leaves their two extensions out.
MEGABLOCKS = Backend(
    backends.MEGABLOCKS,
    lambda _tiles: run_experts_megablocks,
    packages=("megablocks", "megablocks_ops", "grouped_gemm", "grouped_gemm_backend", "stk"),
    install="pip install --no-deps --no-build-isolation stanford-stk==0.7.1 grouped_gemm==0.3.0 "
    "megablocks==0.10.0 (requirements-kernels.txt says how to build them, and what CUDA 13 needs)",
    dtypes=(torch.bfloat16,),
    on_cpu="no",
    oldest_capability=(8, 0),
)
