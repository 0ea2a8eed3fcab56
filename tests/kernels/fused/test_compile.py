"""Every shipped tile and form of experts compiles for GPUs that are not here, without spills.

That takes minutes, and its result depends on nothing but the kernels and Triton. So it is kept:
`benchmarks/results/kernel_resources.json` must be of these very kernels, and of this Triton. After
a change of the kernels:

    PYTHONPATH=. python -m benchmarks.kernel_resources --rank 16 --once_a_tile
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.compile_layer import FORMS, digest_kernels
from benchmarks.kernel_resources import CAPABILITIES, DTYPES, RESULTS, Resources
from megablocks_utils.kernels.device import read_device_facts
from megablocks_utils.kernels.fused.tiles import KINDS, list_candidates, name_architecture

KERNELS = {"gate_up", "row_gemm", "gate_backward", "weight_grad", "combine"}
AGAIN = "compile again: python -m benchmarks.kernel_resources --rank 16 --once_a_tile"


@pytest.fixture(scope="module")
def record():
    return json.loads(RESULTS.read_text())


@pytest.fixture(scope="module")
def rows(record):
    return [Resources(**row) for row in record["kernels"]]


def test_what_is_kept_is_of_these_kernels(record):
    assert record["digest"] == digest_kernels(), AGAIN
    assert record["certificate"]["triton"] == read_device_facts("cpu").triton_version, AGAIN


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", CAPABILITIES)
def test_shipped_tiles_compile(rows, arch, dtype):
    chosen = [row for row in rows if (row.arch, row.dtype) == (arch, dtype)]
    assert [fault for row in chosen for fault in row.faults] == []
    assert {row.kernel for row in chosen} == KERNELS
    assert {row.form for row in chosen} == FORMS.keys()
    table = name_architecture(CAPABILITIES[arch])
    itemsize = DTYPES[dtype].itemsize
    tiles = {t for kind in KINDS for t in list_candidates(kind, arch=table, itemsize=itemsize)}
    shown = {(f"{t.block_m}x{t.block_k}", t.num_warps, t.num_stages) for t in tiles}
    seen = set()
    for row in chosen:
        sizes, warps, stages = row.tile.split() if row.tile.count(" ") == 2 else ("", "w0", "s0")
        block_m, _, block_k = (sizes.split("x") + [""] * 3)[:3]
        seen.add((f"{block_m}x{block_k}", int(warps[1:]), int(stages[1:])))
    assert shown <= seen
    with_tma = {row.kernel for row in chosen if "tma" in row.features}
    assert with_tma == (
        KERNELS - {"weight_grad", "combine"} if table == "sm_90" and itemsize == 2 else set()
    )
    assert all(row.num_tma for row in chosen if "tma" in row.features)


def test_the_compiler_still_gives_what_is_kept(tmp_path, rows):
    """One kernel, in a process of its own, because this one has Triton's interpreter."""
    path = tmp_path / "sm_90.json"
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(path)]
    command += ["--arch", "sm_90", "--dtype", "bfloat16", "--rank", "16", "--column", "1"]
    command += ["--kernel", "gate_backward", "--form", "swiglu", "--once_a_tile"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile for real
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (seen,) = [Resources(**row) for row in json.loads(path.read_text())["kernels"]]
    assert seen in rows


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
