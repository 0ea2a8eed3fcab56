"""The kernels compile for GPUs that are not here: no spills, and memory that fits.

The tiles for many rows of one architecture, and forms of experts whose kernels differ; of other
architectures, and of persistent programs, the kernels that come closest to a limit. All tiles,
architectures and forms: `benchmarks.kernel_resources`. In a process of its own, because this one
has Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.kernel_resources import Resources
from megablocks_utils.kernels.fused.shared_memory import shared_bytes
from megablocks_utils.kernels.fused.tile import KINDS
from megablocks_utils.kernels.fused.tiles import list_candidates

KERNELS = {"gate_up", "row_gemm", "gate_backward", "weight_grad", "combine", "adamw"}
KERNELS.add("combine_backward")
ARCH, COLUMN = "sm_90", 1
FORMS = ("swiglu", "as gpt-oss", "relu squared, no gate")
PERSISTENT = 3
CODED = "swiglu, nf4"
# Architecture, column of the table, rank of adapters, form, kernels.
OTHERS = (
    (ARCH, PERSISTENT, 16, FORMS[0], ("gate_up", "row_gemm")),
    ("sm_89", PERSISTENT, 0, FORMS[0], ("gate_up",)),
    ("sm_100", PERSISTENT, 16, FORMS[0], ("row_gemm",)),
    ("sm_100", 0, 16, FORMS[0], ("gate_backward",)),
    ("sm_120", PERSISTENT, 0, FORMS[0], ("row_gemm",)),
    # Weights that are looked up: the fullest registers of each kernel.
    (ARCH, 1, 16, CODED, ("gate_up", "row_gemm")),
    ("sm_80", 1, 16, CODED, ("gate_backward",)),
)
COMPILE = """
import json, sys
from benchmarks.kernel_resources import main
sys.exit(max([main(argv) for argv in json.loads(sys.argv[1])]))
"""


def _options(arch, column, rank, forms=FORMS[:1], kernels=()):
    options = ["--arch", arch, "--dtype", "bfloat16", "--rank", str(rank), "--column", str(column)]
    return [
        *options,
        "--form",
        *forms,
        "--once_a_tile",
        *(["--kernel", *kernels] if kernels else ()),
    ]


@pytest.fixture(scope="module")
def all_compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    runs = [_options(ARCH, COLUMN, 16, FORMS)]
    runs += [
        _options(arch, column, rank, (form,), names) for arch, column, rank, form, names in OTHERS
    ]
    paths = [folder / f"resources_{i}.json" for i in range(len(runs))]
    argvs = [[*run, "--json", str(path)] for run, path in zip(runs, paths, strict=True)]
    command = [sys.executable, "-c", COMPILE, json.dumps(argvs)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)  # compile for real
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [[Resources(**row) for row in json.loads(path.read_text())["kernels"]] for path in paths]


@pytest.fixture
def compiled(all_compiled):
    return all_compiled[0]


def test_other_architectures_and_persistent_programs_compile(all_compiled):
    for (arch, column, _, _, kernels), rows in zip(OTHERS, all_compiled[1:], strict=True):
        assert {row.kernel for row in rows} == set(kernels), arch
        assert [fault for row in rows for fault in row.faults] == []
        assert all(row.arch == arch for row in rows)
        assert all(("persistent" in row.features) == (column == PERSISTENT) for row in rows)
    # Separate room for results; that of `linear` is for adapters of up to rank 64.
    up, linear = (list_candidates(k, arch=ARCH, itemsize=2)[PERSISTENT] for k in ("up", "linear"))
    shared = {row.kernel: row.shared_bytes for row in all_compiled[1]}
    assert shared["gate_up"] == shared_bytes("up", up, 2)
    operands = shared_bytes("linear", replace(linear, programs_per_processor=0), 2)
    assert operands < shared["row_gemm"] <= shared_bytes("linear", linear, 2)


def test_shipped_tiles_compile(compiled):
    rows = compiled
    assert [fault for row in rows for fault in row.faults] == []
    assert {row.kernel for row in rows} == KERNELS
    tiles = {list_candidates(kind, arch=ARCH, itemsize=2)[COLUMN] for kind in KINDS}
    shown = {(f"{t.block_m}x{t.block_k}", t.num_warps, t.num_stages) for t in tiles}
    seen = set()
    for row in rows:
        sizes, warps, stages = row.tile.split() if row.tile.count(" ") == 2 else ("", "w0", "s0")
        block_m, _, block_k = (sizes.split("x") + [""] * 3)[:3]
        seen.add((f"{block_m}x{block_k}", int(warps[1:]), int(stages[1:])))
    assert shown <= seen
    assert all(row.num_tma for row in rows if "tma" in row.features)
    # Rows that are looked up keep as many steps in shared memory as the tile says.
    tile = list_candidates("weight_grad", arch=ARCH, itemsize=2)[COLUMN]
    wanted = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s5"
    found = {r.shared_bytes for r in rows if r.kernel == "weight_grad" and r.tile == wanted}
    assert found == {shared_bytes("weight_grad", tile, 2)}


def test_every_form_has_its_first_projection_and_gate_by_descriptors(compiled):
    rows = compiled
    for form in FORMS:
        kernels = {row.kernel for row in rows if row.form == form and "tma" in row.features}
        assert kernels >= {"row_gemm", "gate_backward"}, form


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
