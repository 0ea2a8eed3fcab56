"""Compile the kernels of a layer of experts for a GPU that is not there, and run none."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megablocks_utils.kernels.adamw_step import AdamWStep
from megablocks_utils.kernels.fused.adamw import run_adamw
from megablocks_utils.kernels.fused.combine import combine
from megablocks_utils.kernels.fused.combine_backward import combine_backward
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.gate import SWIGLU, Activation, Clamp, KnownActivation, KnownGate
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.quantization.packed_experts import PackedExperts

TILE_OPTIONS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
# Mixtral-8x7B: every size is a multiple of every tile's, which is the path that counts.
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 4096, 14336, 8, 2
NUM_TOKENS = 4096
# What of a kernel differs between the forms of experts.
_FORM_OPTIONS = ("GATED", "INTERLEAVED", "ACTIVATION", "CLAMP", "KEEP_GATE_UP_OUT", "TOP_K_POW2")


@dataclass(frozen=True)
class Form:
    """What experts compute, and how their weights lie."""

    gate: KnownGate | KnownActivation = SWIGLU
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    packed_in: str | None = None

    @property
    def num_outputs(self) -> int:
        """F: of the first projection."""
        return INTERMEDIATE * (2 if isinstance(self.gate, KnownGate) else 1)


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "swiglu": Form(),
        "as gpt-oss": Form(
            KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.702),
            has_bias=True,
            is_transposed=True,
            is_interleaved=True,
        ),
        "gelu, clamp before": Form(KnownGate(Activation.GELU_TANH, Clamp.BEFORE, 10.0)),
        "silu, clamp after": Form(KnownGate(clamp=Clamp.AFTER, limit=10.0)),
        "relu squared, no gate": Form(KnownActivation(Activation.RELU_SQUARED), has_bias=True),
        "gelu, no gate": Form(KnownActivation(Activation.GELU_TANH)),
        "swiglu, nf4": Form(packed_in="nf4"),
        "as gpt-oss, mxfp4": Form(
            KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.702),
            has_bias=True,
            is_transposed=True,
            is_interleaved=True,
            packed_in="mxfp4",
        ),
    }
)
"""SwiGLU, and others that take the most registers or the other branches of the kernels."""


class _NoDevice:
    """Stands in for Triton's driver: names the GPU to compile for, has none to run on.

    Triton keeps the target of a device number, so every GPU has one of its own.
    """

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0


@contextmanager
def compile_only(
    capability: int,
    *,
    once_a_tile: bool,
    kernels: Collection[str] | None = None,
    only_persistent: bool = False,
) -> Iterator[list[tuple[Any, Any, dict]]]:
    """Compile kernels that are launched inside for a GPU, and launch none.

    Triton has no switch for this: `JITFunction.run` takes `warmup`, which the launch syntax sets to
    False, so it is replaced while the block runs.

    Args:
        capability: 80, 90, ...
        once_a_tile: whether a kernel is compiled once for each tile and form of the experts,
            whatever else differs.
        kernels: names of those to compile, or None for all.
        only_persistent: whether kernels of one program a tile are left out.

    Yields:
        Kernel, compiled kernel and launch options, for each new one.
    """
    compiled: list[tuple[Any, Any, dict]] = []
    seen: set[Any] = set()
    run = JITFunction.run

    def compile_kernel(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> Any:
        name = self.fn.__name__.removesuffix("_kernel")
        load = kwargs.get("LOAD")
        # Either way that codes run: a kernel's registers go with it.
        tile = (
            *(name, load if load is not None and load.code_block else None),
            *(kwargs.get(option) for option in TILE_OPTIONS + _FORM_OPTIONS),
        )
        is_wanted = kernels is None or name in kernels
        if only_persistent:
            is_wanted &= kwargs.get("PERSISTENT", False)
        if not is_wanted or (once_a_tile and tile in seen):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.update({id(kernel), tile})
            compiled.append((self, kernel, kwargs))
        return kernel

    driver.set_active(_NoDevice(capability))
    JITFunction.run = compile_kernel
    try:
        yield compiled
    finally:
        JITFunction.run = run


def run_layer(dtype: torch.dtype, rank: int, tiles: TileTable, form: Form) -> None:
    """Run a layer that trains everything, forward and backward, on meta tensors.

    Args:
        dtype: of compute.
        rank: of adapters on both projections; 0 is none.
        tiles: of each kind of kernel.
        form: of the experts.
    """

    def make(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        made = torch.empty(*shape, dtype=kind, device="meta")
        return made.requires_grad_(kind.is_floating_point)

    loras: list[LowRank | None] = [None, None]
    if rank:
        sides = (form.num_outputs, HIDDEN), (HIDDEN, INTERMEDIATE)
        loras = [
            LowRank(
                make(NUM_EXPERTS, rank, num_in),
                make(NUM_EXPERTS, num_out, rank),
                1.0,
            )
            for num_out, num_in in sides
        ]

    def make_weights(num_out: int, num_in: int) -> torch.Tensor:
        weights = make(
            NUM_EXPERTS, *((num_in, num_out) if form.is_transposed else (num_out, num_in))
        )
        if form.packed_in is None:
            return weights
        return PackedExperts.empty(
            form.packed_in, weights, device=weights.device, is_transposed=form.is_transposed
        )

    experts = ExpertWeights(
        make_weights(form.num_outputs, HIDDEN),
        make_weights(HIDDEN, INTERMEDIATE),
        form.gate,
        gate_up_lora=loras[0],
        down_lora=loras[1],
        gate_up_bias=make(NUM_EXPERTS, form.num_outputs) if form.has_bias else None,
        down_bias=make(NUM_EXPERTS, HIDDEN) if form.has_bias else None,
        is_transposed=form.is_transposed,
        is_interleaved=form.is_interleaved,
        has_gate=isinstance(form.gate, KnownGate),
    )
    num_rows = NUM_TOKENS * TOP_K
    order, inverse, counts = (
        make(size, kind=torch.int64) for size in (num_rows, num_rows, NUM_EXPERTS)
    )
    tokens = make(NUM_TOKENS, HIDDEN)
    weights = make(NUM_TOKENS, TOP_K, kind=torch.float32)
    output = run_experts_triton(
        tokens, ExpertOrder(order, inverse, counts, TOP_K), weights, experts, tiles=tiles
    )
    output.backward(torch.empty_like(output))


def run_combine(dtype: torch.dtype, top_k: int) -> None:
    """Sum K rows a token that lie in expert order, and go back, on meta tensors.

    Args:
        dtype: of the rows.
        top_k: K; the size of a tile depends on it.
    """
    rows = torch.empty(NUM_TOKENS * top_k, HIDDEN, dtype=dtype, device="meta")
    weights = torch.empty(NUM_TOKENS, top_k, device="meta")
    inverse = torch.empty(len(rows), dtype=torch.int64, device="meta")
    grad = combine(rows, weights, top_k, inverse)
    combine_backward(grad, rows, weights, inverse, wants_rows=True, wants_weights=True)


def run_optimizer(dtype: torch.dtype) -> None:
    """Update a parameter of the layer's size on meta tensors, its moments in the same dtype."""
    pieces = [
        torch.empty(NUM_EXPERTS, HIDDEN, HIDDEN, dtype=dtype, device="meta") for _ in range(4)
    ]
    weight, gradient, exp_avg, exp_avg_sq = pieces
    adamw = AdamWStep(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=1)
    moments = (exp_avg, exp_avg_sq)
    run_adamw(weight, gradient, *moments, adamw, seed=2**40, is_weight_stochastic=True)
