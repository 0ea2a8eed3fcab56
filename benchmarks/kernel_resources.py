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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.compile_layer import (
    FORMS,
    TILE_OPTIONS,
    compile_only,
    run_combine,
    run_layer,
    run_optimizer,
)
from benchmarks.harness.provenance import build_provenance
from megablocks_utils.kernels.fused.shared_memory import SHARED_LIMIT_BYTES
from megablocks_utils.kernels.fused.tile import KINDS, TileTable
from megablocks_utils.kernels.fused.tiles import list_candidates, name_architecture

RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"
CAPABILITIES = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_NUM_COLUMNS = 4
_PERSISTENT_COLUMN = 3
_WITHOUT_PRODUCTS = ("combine", "combine_backward", "adamw")
_TOP_K = (2, 8, 10)
"""How many rows a token has: Mixtral's, Qwen3's, and one that is no power of two."""


@dataclass(frozen=True)
class Variant:
    """What is compiled: a layer's kernels with one column of the table of tiles.

    Attributes:
        arch: key of `CAPABILITIES`.
        dtype: key of `DTYPES`.
        column: 0 is for few rows per expert, 1 for many, 2 is what a search tries besides, and 3
            for persistent programs, for kernels that have them.
        rank: of adapters on both projections; 0 is none.
    """

    arch: str
    dtype: str
    column: int
    rank: int

    def tiles(self) -> TileTable:
        """Return the tile of each kind."""
        itemsize = DTYPES[self.dtype].itemsize
        arch = name_architecture(CAPABILITIES[self.arch])
        candidates = {k: list_candidates(k, arch=arch, itemsize=itemsize) for k in KINDS}
        return TileTable(
            **{kind: tiles[min(self.column, len(tiles) - 1)] for kind, tiles in candidates.items()}
        )


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; sizes in bytes, counts of instructions in the PTX.

    `num_mma` counts those of Blackwell's tensor cores, too.
    """

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
    form: str = "swiglu"

    @property
    def faults(self) -> list[str]:
        """Say what makes this kernel unfit to be shipped."""
        limit = SHARED_LIMIT_BYTES[name_architecture(CAPABILITIES[self.arch])]
        wants_tensor_cores = self.kernel not in _WITHOUT_PRODUCTS and self.dtype != "float32"
        wants_wgmma = wants_tensor_cores and self.arch == "sm_90" and "thin" not in self.features
        checks = {
            f"{self.stack_bytes} bytes of stack: registers spill": self.stack_bytes > 0,
            f"{self.shared_bytes} of {limit} bytes of shared memory": self.shared_bytes > limit,
            "no wgmma": wants_wgmma and self.num_wgmma == 0,
            "no tensor cores": wants_tensor_cores and self.num_wgmma + self.num_mma == 0,
        }
        return [fault for fault, is_there in checks.items() if is_there]


def compile_variant(
    variant: Variant,
    *,
    once_a_tile: bool = False,
    forms: Sequence[str] = tuple(FORMS),
    kernels: Sequence[str] | None = None,
) -> list[Resources]:
    """Compile the kernels of a layer that trains all, adapters too, and those beside it."""
    major, minor = CAPABILITIES[variant.arch]
    found: list[Resources] = []
    capability = 10 * major + minor
    only_persistent = variant.column == _PERSISTENT_COLUMN
    with compile_only(
        capability, once_a_tile=once_a_tile, kernels=kernels, only_persistent=only_persistent
    ) as compiled:
        for form in forms:
            run_layer(DTYPES[variant.dtype], variant.rank, variant.tiles(), FORMS[form])
            found += [_describe(*entry, variant, form) for entry in compiled]
            compiled.clear()
        for top_k in _TOP_K:
            run_combine(DTYPES[variant.dtype], top_k)
        found += [_describe(*entry, variant, "weighted sum") for entry in compiled]
        compiled.clear()
        run_optimizer(DTYPES[variant.dtype])
        found += [_describe(*entry, variant, "optimizer") for entry in compiled]
    return found


def _describe(function: Any, kernel: Any, options: dict, variant: Variant, form: str) -> Resources:
    ptx = kernel.asm["ptx"]
    usage = _read_usage(kernel.asm["cubin"])
    tile = "x".join(str(options[name]) for name in TILE_OPTIONS[:3] if name in options)
    blocks = [options[name] for name in TILE_OPTIONS[:2] if name in options]
    load = options.get("LOAD")
    flags = {
        "adapter": options.get("HAS_LORA", False),
        "thin": bool(blocks) and min(blocks) < 64,
        "tma": load is not None and load.uses_tma,
        "shared out": options.get("SPLITS", 1) > 1,
        "persistent": options.get("PERSISTENT", False),
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
        num_mma=len(re.findall(r"\bmma\.sync|\btcgen05\.mma\.cta", ptx)),
        num_tma=ptx.count("cp.async.bulk.tensor"),
        form=form,
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
    head = ["arch", "dtype", "form", "kernel", "tile, warps, stages", "with", "registers"]
    head += ["spilled bytes"]
    head += ["shared KiB", "wgmma", "mma", "TMA"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row.arch, row.dtype, row.form, row.kernel, row.tile, row.features, row.registers]
        cells += [row.stack_bytes, f"{row.shared_bytes / 1024:.0f}"]
        cells += [row.num_wgmma, row.num_mma, row.num_tma]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _group(row: Resources) -> tuple[int, int, str, str]:
    """Return what `--add` replaces as one, and rows are sorted by."""
    places = list(CAPABILITIES).index(row.arch), list(DTYPES).index(row.dtype)
    return *places, row.form, row.kernel


def list_variants(
    archs: Sequence[str], dtypes: Sequence[str], columns: Sequence[int], ranks: Sequence[int]
) -> list[Variant]:
    """Return everything that is shipped for these."""
    return [
        Variant(arch, dtype, column, rank)
        for arch in archs
        for dtype in dtypes
        for column in columns
        for rank in ranks
    ]


def main(argv: Sequence[str]) -> int:
    """Compile, write JSON, print the table; 1 if a kernel is unfit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rank", nargs="+", type=int, default=[0, 16, 64])
    columns = tuple(range(_NUM_COLUMNS))
    parser.add_argument("--column", nargs="+", type=int, choices=columns, default=columns)
    parser.add_argument("--kernel", nargs="+", help="names of those to compile; default all")
    parser.add_argument("--once_a_tile", action="store_true", help="one variant of each tile")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep other kernels' rows")
    options = parser.parse_args(argv)
    compile_all = partial(
        compile_variant,
        once_a_tile=options.once_a_tile,
        forms=options.form,
        kernels=options.kernel,
    )
    rows: dict[Resources, None] = {}
    for variant in list_variants(options.arch, options.dtype, options.column, options.rank):
        rows |= dict.fromkeys(compile_all(variant))
    provenance = build_provenance("benchmarks.kernel_resources", argv, triton=triton.__version__)
    before = json.loads(options.json.read_text()) if options.add else {}
    compiled = {_group(row) for row in rows}
    old = [Resources(**row) for row in before.get("kernels", [])]
    kept = [row for row in old if _group(row) not in compiled]
    payload = {
        "certificate": provenance,
        "older": [*before.get("older", []), *filter(None, [before.get("certificate")])],
        "kernels": [asdict(row) for row in sorted([*kept, *rows], key=_group)],
    }
    options.json.write_text(json.dumps(payload, indent=1) + "\n")
    sys.stdout.write(format_table(list(rows)) + "\n")
    unfit = [f"{row.kernel} {row.tile} on {row.arch}: {f}" for row in rows for f in row.faults]
    sys.stderr.writelines(f"{line}\n" for line in unfit)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
