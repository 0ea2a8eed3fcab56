"""Every shipped tile compiles for GPUs that are not here: no spills, and memory that fits.

In processes of their own, because this one has Triton's interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kernel_resources import Resources
from megablocks_utils.kernels.fused.tiles import KINDS, list_candidates

KERNELS = {"gate_up", "row_gemm", "gate_backward", "weight_grad", "combine"}


def compile_for(arch, folder):
    path = folder / f"{arch}.json"
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(path)]
    command += ["--arch", arch, "--dtype", "bfloat16", "--rank", "16", "--once_a_tile"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)  # compile for real
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert path.exists(), done.stderr
    return done, [Resources(**row) for row in json.loads(path.read_text())["kernels"]]


@pytest.mark.parametrize("arch", ["sm_90"])  # sm_80, sm_86: benchmarks.kernel_resources
def test_shipped_tiles_compile(tmp_path, arch):
    done, rows = compile_for(arch, tmp_path)
    assert [fault for row in rows for fault in row.faults] == []
    assert done.returncode == 0, done.stderr
    assert {row.kernel for row in rows} == KERNELS
    tiles = {tile for kind in KINDS for tile in list_candidates(kind, arch=arch, itemsize=2)}
    shown = {(f"{t.block_m}x{t.block_k}", t.num_warps, t.num_stages) for t in tiles}
    seen = set()
    for row in rows:
        sizes, warps, stages = row.tile.split() if row.tile.count(" ") == 2 else ("", "w0", "s0")
        block_m, _, block_k = (sizes.split("x") + [""] * 3)[:3]
        seen.add((f"{block_m}x{block_k}", int(warps[1:]), int(stages[1:])))
    assert shown <= seen
    if arch == "sm_90":
        assert all(row.num_tma for row in rows if "tma" in row.features)
        assert {row.kernel for row in rows if "tma" in row.features} == {
            "gate_up",
            "row_gemm",
            "gate_backward",
        }


def test_faults_are_seen():
    fine = Resources("gate_up", "sm_90", "bfloat16", "128x128x64", "", 200, 0, 200_000, 8, 0, 6)
    assert fine.faults == []
    bad = Resources("gate_up", "sm_90", "bfloat16", "128x128x64", "", 255, 8, 240_000, 0, 0, 6)
    assert bad.faults == [
        "8 bytes of stack: registers spill",
        "240000 of 232448 bytes of shared memory",
        "no wgmma",
        "no tensor cores",
    ]
    thin = Resources("row_gemm", "sm_90", "bfloat16", "128x16x64", "thin", 60, 0, 70_000, 0, 16, 0)
    assert thin.faults == []
