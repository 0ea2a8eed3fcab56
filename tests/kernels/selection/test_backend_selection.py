"""The selection of a backend: by name, or the fastest of any number that were measured."""

import pickle
from dataclasses import replace

import pytest
import torch

from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.selection.backend_selection import (
    BackendSelection,
    select_and_load_backend,
    select_backend,
)
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import Measurements, store_entry
from tests.kernels.facts import (
    A100,
    B200,
    CPU,
    H100,
    INTERPRETER,
    RTX_5090,
    V100,
    put_packages,
    put_triton,
)
from tests.kernels.measured import SHAPES, TILES, measured

FITTING = ExpertShapes(64, 96, torch.float32, "cpu")
WHY = "grouped_mm runs these experts"
WHERE = "2026-01-02, NVIDIA H100 80GB HBM3, torch 2.13.0, triton 3.9.0, about 32,768 rows)"
GAP = (
    "no kernel was measured here for these experts, lora, with about 32,768 rows (python -m "
    "megablocks_utils.tune does it)"
)
UNSHIPPED = ", and none are shipped yet"
FASTER = f"triton was measured fastest, 12.00 ms a layer (grouped_mm 20.50 ms, {WHERE}"
SLOW = measured({"eager": 30.0, "grouped_mm": 20.5, "triton": None})
SLOWER = (
    "grouped_mm was measured fastest, 20.50 ms a layer (eager 30.00 ms, triton out of memory, "
    f"{WHERE}"
)


@pytest.mark.parametrize(
    ("shapes", "name", "reason"),
    [
        (FITTING, "grouped_mm", WHY),
        (
            replace(FITTING, intermediate_size=90),
            "eager",
            "grouped_mm needs intermediate_size (90) to be a multiple of 4 in float32",
        ),
    ],
)
def test_auto_on_a_cpu_takes_what_runs_there_and_reads_no_file(
    shapes, name, reason, monkeypatch, tmp_path
):
    (tmp_path / "kernels.json").write_text("damaged")
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    for device in (CPU, INTERPRETER):
        selection = select_backend("auto", shapes, device)
        assert (selection.name, selection.reason) == (name, f"auto: {reason}")


AUTO_ON_CUDA = {
    "nothing was measured": (Measurements(), "grouped_mm", f"{WHY}; {GAP}{UNSHIPPED}"),
    "triton won here": (Measurements((measured(),)), "triton", FASTER),
    "triton won elsewhere": (Measurements((), (measured(),)), "triton", FASTER),
    "grouped_mm won here": (Measurements((SLOW,), (measured(),)), "grouped_mm", SLOWER),
    "another mode was measured": (
        Measurements((measured(shapes=replace(SHAPES, mode="full")),), (SLOW,)),
        "grouped_mm",
        SLOWER,
    ),
    "other experts are shipped": (
        Measurements((), (measured(shapes=replace(SHAPES, top_k=1)),)),
        "grouped_mm",
        f"{WHY}; {GAP}",
    ),
    "the file is damaged": (
        Measurements((), (), "FILE is damaged"),
        "grouped_mm",
        f"{WHY}; {GAP}{UNSHIPPED}; FILE is damaged",
    ),
    "the file is damaged, and one is shipped": (
        Measurements((), (measured(),), "FILE is damaged"),
        "triton",
        f"{FASTER}; FILE is damaged",
    ),
    "what won cannot run here": (
        Measurements((measured({"scattermoe": 9.0, "grouped_mm": 20.5, "triton": 12.0}),)),
        "triton",
        "triton was measured fastest, 12.00 ms a layer (grouped_mm 20.50 ms, scattermoe 9.00 ms, "
        f"but it cannot run here, {WHERE}",
    ),
    "of equal ones the more portable": (
        Measurements((measured({"eager": 30.0, "grouped_mm": 12.0, "triton": 12.0}),)),
        "grouped_mm",
        "grouped_mm was measured fastest, 12.00 ms a layer (triton 12.00 ms, eager 30.00 ms, "
        f"{WHERE}",
    ),
    "a backend of another version": (
        Measurements((measured({"sonic": 9.0}),)),
        "grouped_mm",
        f"{WHY}; {GAP}{UNSHIPPED}",
    ),
}


@pytest.mark.parametrize("case", AUTO_ON_CUDA)
def test_auto_on_cuda_goes_by_what_was_measured(case, monkeypatch):
    put_triton(monkeypatch)
    measurements, name, reason = AUTO_ON_CUDA[case]
    selection = select_backend("auto", SHAPES, H100, measurements)
    assert (selection.name, selection.reason) == (name, f"auto: {reason}")
    assert selection.tiles == (TILES if name == "triton" else None)


LOOPS = "torch's grouped_mm multiplies one expert after the other"


@pytest.mark.parametrize(
    ("device", "changed", "name", "why"),
    [
        (H100, {}, "grouped_mm", WHY),
        (B200, {}, "grouped_mm", WHY),
        (A100, {}, "triton", f"on NVIDIA A100 (compute capability 8.0) {LOOPS}"),
        (RTX_5090, {}, "triton", f"on {RTX_5090.name} (compute capability 12.0) {LOOPS}"),
        (H100, {"dtype": torch.float16}, "triton", f"in float16 {LOOPS}"),
        (A100, {"dtype": torch.float32}, "grouped_mm", WHY),
        (
            H100,
            {"intermediate_size": 90},
            "triton",
            "grouped_mm needs intermediate_size (90) to be a multiple of 8 in bfloat16",
        ),
    ],
)
def test_auto_without_measurements_goes_by_what_torch_has(device, changed, name, why, monkeypatch):
    put_triton(monkeypatch)
    selection = select_backend("auto", replace(SHAPES, **changed), device, Measurements())
    assert selection.name == name
    assert selection.reason.startswith(f"auto: {why}; no kernel was measured here for these")
    can_both = changed != {"intermediate_size": 90}
    others = {"grouped_mm": "triton", "triton": "grouped_mm" if can_both else None}
    assert selection.alternative == others[name]
    put_packages(monkeypatch)
    if can_both:  # slow is better than nothing
        selection = select_backend("auto", replace(SHAPES, **changed), device, Measurements())
        assert (selection.name, selection.alternative) == ("grouped_mm", None)


def test_auto_ranks_packages_as_it_does_our_own(monkeypatch):
    put_packages(monkeypatch, "triton", "scattermoe")
    times_ms = {"grouped_mm": 20.5, "triton": 12.0, "scattermoe": 9.0}
    shapes = replace(SHAPES, mode="full")
    measurements = Measurements((measured(times_ms, shapes=shapes),))
    selection = select_backend("auto", shapes, H100, measurements)
    assert (selection.name, selection.tiles) == ("scattermoe", None)


def test_auto_where_what_was_measured_cannot_run(monkeypatch):
    won = Measurements((measured({"triton": 12.0}),))
    put_packages(monkeypatch)
    assert select_backend("auto", SHAPES, H100, won).name == "grouped_mm"
    put_triton(monkeypatch)
    selection = select_backend("auto", SHAPES, V100, won)
    assert selection.name == "eager"
    assert selection.reason.startswith(
        "auto: grouped_mm needs compute capability 8.0 or newer, and Tesla V100 has 7.0; "
    )


def test_auto_without_a_number_of_rows(monkeypatch):
    put_triton(monkeypatch)
    shapes = replace(SHAPES, num_rows=None)
    assert select_backend("auto", shapes, H100, Measurements((measured(),))).reason == (
        f"auto: {WHY}; how many rows the experts get is not known, so no measurement was looked up"
    )


@pytest.mark.parametrize(
    ("measurements", "reason", "tiles"),
    [
        (Measurements(), "", None),
        (Measurements((SLOW,)), ", with the tiles measured 2026-01-02", TILES),
        (Measurements((measured(tiles=None),)), "", None),
        (Measurements((), (), "FILE is damaged"), "; FILE is damaged", None),
    ],
)
def test_triton_by_name_takes_its_tiles_also_where_it_lost(
    measurements, reason, tiles, monkeypatch
):
    put_triton(monkeypatch)
    selection = select_backend("triton", SHAPES, H100, measurements)
    wanted = BackendSelection("triton", f"asked for by name{reason}", tiles)
    assert selection == wanted == pickle.loads(pickle.dumps(selection))


def test_this_machines_file_is_read(monkeypatch, tmp_path):
    put_triton(monkeypatch)
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    assert select_backend("auto", SHAPES, H100).name == "grouped_mm"
    store_entry(measured(), tmp_path / "kernels.json")
    loaded = select_and_load_backend("auto", SHAPES, H100)
    assert (loaded.name, loaded.reason) == ("triton", f"auto: {FASTER}")
    assert loaded.run.keywords == {"tiles": TILES}


def test_named_backends_need_no_measurement():
    loaded = select_and_load_backend("eager", FITTING)
    assert (loaded.name, loaded.reason) == ("eager", "asked for by name")
    assert loaded.run is run_experts_eager
