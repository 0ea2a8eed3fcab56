"""Run experts through the megablocks package (Gale et al., arXiv 2211.15841), where it is built.

Its grouped dropless path: gather, grouped products, scatter, with the package's own operators and
no others. Written against megablocks 0.10.0 and grouped_gemm 0.3.0.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.eager import run_experts_eager
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights

MEGABLOCKS_INSTALL = (
    "pip install --no-deps --no-build-isolation stanford-stk==0.7.1 grouped_gemm==0.3.0 "
    "megablocks==0.10.0 (requirements-kernels.txt says how to build them, and what CUDA 13 needs)"
)

# The packages and the CUDA extensions that they import; a build without CUDA leaves those out.
_MODULES = ("megablocks", "megablocks_ops", "grouped_gemm", "grouped_gemm_backend", "stk")
_MAX_ELEMENTS = 2**31 - 1
_NO_ADAPTERS = "megablocks does not support LoRA on experts; --kernel triton and grouped_mm do"


def is_megablocks_installed() -> bool:
    """Say whether the package and all it imports can be imported, without importing them."""
    return all(find_spec(name) is not None for name in _MODULES)


def find_megablocks_unsupported_reason(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device_type: str,
    has_adapters: bool,
) -> str | None:
    """Say in a clause why megablocks cannot run these experts, or return None; any size is fine."""
    if has_adapters:
        return _NO_ADAPTERS
    if device_type != "cuda":
        return f"megablocks needs a CUDA device, and the device is {device_type}"
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"megablocks' grouped_gemm takes bfloat16 only, and the dtype of compute is {name}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "megablocks needs compute capability 8.0 or newer"
    return None


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
    if experts.has_adapters:
        raise ConfigurationError(f"--kernel is megablocks, but {_NO_ADAPTERS}.")
    if experts.gate_up_bias is not None or experts.down_bias is not None:
        raise ConfigurationError(
            "--kernel is megablocks, which has no biases of experts, but these experts have them; "
            "--kernel triton and grouped_mm add them."
        )
    if num_rows * hidden_size > _MAX_ELEMENTS:
        raise ConfigurationError(
            f"--kernel is megablocks, which counts in 32 bits, but {num_rows} rows of "
            f"{hidden_size} have more than {_MAX_ELEMENTS} elements; --kernel triton counts in 64."
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
    hidden = gmm(rows, experts.gate_up_proj, batch_sizes, trans_b)
    hidden = experts.apply_gate(hidden).contiguous()
    return gmm(hidden, experts.down_proj, batch_sizes, trans_b)
