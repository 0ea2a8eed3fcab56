"""Compile every Triton kernel for GPUs that are not there, and read what the compiler gave it.

    PYTHONPATH=. python -m benchmarks.kernel_resources

The real layer runs forward and backward on meta tensors of a real model's sizes, so that what is
compiled is what would be launched. Registers, stack (where spills go) and shared memory are read
from the binaries by cuobjdump, instructions from the PTX.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.harness.provenance import build_provenance
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.fused.tiles import (
    KINDS,
    SHARED_LIMIT_BYTES,
    TileTable,
    list_candidates,
)
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights, LowRank

RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"
ARCHITECTURES = {"sm_80": 80, "sm_86": 86, "sm_90": 90}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Mixtral-8x7B: every size is a multiple of every tile's, which is the path that counts.
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 4096, 14336, 8, 2
NUM_TOKENS = 4096
_NUM_COLUMNS = 3
_SHOWN = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")


@dataclass(frozen=True)
class Variant:
    """What is compiled: a layer's kernels with one column of the table of tiles.

    Attributes:
        arch: key of `ARCHITECTURES`.
        dtype: key of `DTYPES`.
        column: 0 is for few rows per expert, 1 for many, 2 is what a search tries besides.
        rank: of adapters on both projections; 0 is none.
    """

    arch: str
    dtype: str
    column: int
    rank: int

    def tiles(self) -> TileTable:
        """Return the tile of each kind."""
        itemsize = DTYPES[self.dtype].itemsize
        candidates = {k: list_candidates(k, arch=self.arch, itemsize=itemsize) for k in KINDS}
        return TileTable(**{kind: tiles[self.column] for kind, tiles in candidates.items()})


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; sizes in bytes, counts of instructions in the PTX."""

    kernel: str
    arch: str
    dtype: str
    tile: str
    features: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_wgmma: int
    num_mma: int
    num_tma: int

    @property
    def faults(self) -> list[str]:
        """Say what makes this kernel unfit to be shipped."""
        limit = SHARED_LIMIT_BYTES[self.arch]
        wants_tensor_cores = self.kernel != "combine" and self.dtype != "float32"
        wants_wgmma = wants_tensor_cores and self.arch == "sm_90" and "thin" not in self.features
        checks = {
            f"{self.stack_bytes} bytes of stack: registers spill": self.stack_bytes > 0,
            f"{self.shared_bytes} of {limit} bytes of shared memory": self.shared_bytes > limit,
            "no wgmma": wants_wgmma and self.num_wgmma == 0,
            "no tensor cores": wants_tensor_cores and self.num_wgmma + self.num_mma == 0,
        }
        return [fault for fault, is_there in checks.items() if is_there]


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
def compile_only(capability: int, *, once_a_tile: bool) -> Iterator[list[tuple[Any, Any, dict]]]:
    """Compile kernels that are launched inside for a GPU, and launch none.

    Triton has no switch for this: `JITFunction.run` takes `warmup`, which the launch syntax sets to
    False, so it is replaced while the block runs.

    Args:
        capability: 80, 90, ...
        once_a_tile: whether a kernel is compiled once for each tile only, whatever else differs.

    Yields:
        Kernel, compiled kernel and launch options, for each new one.
    """
    compiled: list[tuple[Any, Any, dict]] = []
    seen: set[Any] = set()
    run = JITFunction.run

    def compile_kernel(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> Any:
        tile = (self.fn.__name__, *(kwargs.get(name) for name in _SHOWN))
        if once_a_tile and tile in seen:
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


def compile_variant(variant: Variant, *, once_a_tile: bool = False) -> list[Resources]:
    """Compile the kernels of a layer that trains everything, adapters too where it has any."""
    with compile_only(ARCHITECTURES[variant.arch], once_a_tile=once_a_tile) as compiled:
        _run_layer(variant)
    return [_describe(*entry, variant) for entry in compiled]


def _run_layer(variant: Variant) -> None:
    dtype = DTYPES[variant.dtype]

    def make(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        made = torch.empty(*shape, dtype=kind, device="meta")
        return made.requires_grad_(kind.is_floating_point)

    loras: list[LowRank | None] = [None, None]
    if variant.rank:
        sides = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
        loras = [
            LowRank(
                make(NUM_EXPERTS, variant.rank, num_in),
                make(NUM_EXPERTS, num_out, variant.rank),
                1.0,
            )
            for num_out, num_in in sides
        ]
    experts = ExpertWeights(
        make(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN),
        make(NUM_EXPERTS, HIDDEN, INTERMEDIATE),
        SWIGLU,
        gate_up_lora=loras[0],
        down_lora=loras[1],
    )
    num_rows = NUM_TOKENS * TOP_K
    order, inverse, counts = (
        make(size, kind=torch.int64) for size in (num_rows, num_rows, NUM_EXPERTS)
    )
    tokens = make(NUM_TOKENS, HIDDEN)
    weights = make(NUM_TOKENS, TOP_K, kind=torch.float32)
    output = run_experts_triton(
        tokens, ExpertOrder(order, inverse, counts, TOP_K), weights, experts, tiles=variant.tiles()
    )
    output.backward(torch.empty_like(output))


def _describe(function: Any, kernel: Any, options: dict, variant: Variant) -> Resources:
    ptx = kernel.asm["ptx"]
    usage = _read_usage(kernel.asm["cubin"])
    tile = "x".join(str(options[name]) for name in _SHOWN[:3] if name in options)
    blocks = [options[name] for name in _SHOWN[:2] if name in options]
    flags = {
        "adapter": options.get("HAS_LORA", False),
        "thin": bool(blocks) and min(blocks) < 64,
        "tma": options.get("USE_TMA", False),
        "shared out": options.get("SPLITS", 1) > 1,
    }
    return Resources(
        kernel=function.fn.__name__.removesuffix("_kernel"),
        arch=variant.arch,
        dtype=variant.dtype,
        tile=f"{tile} w{options.get('num_warps', 4)} s{options.get('num_stages', 3)}".strip(),
        features=", ".join(name for name, is_on in flags.items() if is_on),
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        num_wgmma=ptx.count("wgmma.mma_async"),
        num_mma=len(re.findall(r"\bmma\.sync", ptx)),
        num_tma=ptx.count("cp.async.bulk.tensor"),
    )


def _read_usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK and LOCAL of the one kernel in a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}


def format_table(rows: Sequence[Resources]) -> str:
    """Return the rows as a Markdown table."""
    head = ["arch", "dtype", "kernel", "tile, warps, stages", "with", "registers", "spilled bytes"]
    head += ["shared KiB", "wgmma", "mma", "TMA"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row.arch, row.dtype, row.kernel, row.tile, row.features, row.registers]
        cells += [row.stack_bytes, f"{row.shared_bytes / 1024:.0f}"]
        cells += [row.num_wgmma, row.num_mma, row.num_tma]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def list_variants(
    archs: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int]
) -> list[Variant]:
    """Return everything that is shipped for these."""
    return [
        Variant(arch, dtype, column, rank)
        for arch in archs
        for dtype in dtypes
        for column in range(_NUM_COLUMNS)
        for rank in ranks
    ]


def main(argv: Sequence[str]) -> int:
    """Compile, write JSON, print the table; 1 if a kernel is unfit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rank", nargs="+", type=int, default=[0, 16, 64])
    parser.add_argument("--once_a_tile", action="store_true", help="one variant of each tile")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows: dict[Resources, None] = {}
    for variant in list_variants(options.arch, options.dtype, options.rank):
        rows |= dict.fromkeys(compile_variant(variant, once_a_tile=options.once_a_tile))
    provenance = build_provenance("benchmarks.kernel_resources", argv, triton=triton.__version__)
    payload = {"certificate": provenance, "kernels": [asdict(row) for row in rows]}
    options.json.write_text(json.dumps(payload, indent=1) + "\n")
    sys.stdout.write(format_table(list(rows)) + "\n")
    unfit = [f"{row.kernel} {row.tile} on {row.arch}: {f}" for row in rows for f in row.faults]
    sys.stderr.writelines(f"{line}\n" for line in unfit)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
