"""Every backend that can run a layer is measured; what is kept of it is what `auto` ranks."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.gate import ActivationGate
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measure_layer import build_entry, measure_layer
from tests.kernels.facts import H100, V100, put_triton

SHAPES = ExpertShapes(
    64, 96, torch.bfloat16, "cuda", num_local_experts=4, top_k=2, num_rows=66, mode="frozen"
)
TRITON_MS = 5.0


@pytest.fixture
def measure(monkeypatch):
    """Measure on a machine with Triton, whose times are planted."""
    ran = []

    def run_triton(*inputs, tiles):
        ran.append(tiles)
        return run_experts_eager(*inputs)

    put_triton(monkeypatch, run_triton)

    def measure(shapes=SHAPES, facts=H100, *, triton_ms=TRITON_MS, eager_ms=9.0, grouped_mm_ms=7.0):
        others_ms = iter((eager_ms, grouped_mm_ms))

        def time_ms(run):
            before = len(ran)
            run()
            return triton_ms if len(ran) > before else next(others_ms)

        return measure_layer(shapes, facts, "cpu", lora_r=4, time_ms=time_ms)

    return measure


def test_all_that_can_run_are_measured_and_kept(measure):
    measured = measure()
    assert measured.times_ms == {"eager": 9.0, "grouped_mm": 7.0, "triton": TRITON_MS}
    assert measured.fastest == "triton"
    entry = build_entry(measured, SHAPES, H100, lora_r=4)
    assert entry.times_ms == measured.times_ms
    assert (entry.tiles, entry.lora_r) == (measured.search.tiles, None)
    assert [name for _, name in entry.ranking] == ["triton", "grouped_mm", "eager"]


def test_what_does_not_fit_in_memory_is_kept_as_that(measure):
    measured = measure(triton_ms=math.inf)
    assert measured.fastest == "grouped_mm"
    entry = build_entry(measured, SHAPES, H100, lora_r=4)
    assert entry.times_ms == {"eager": 9.0, "grouped_mm": 7.0, "triton": None}


def test_a_layer_that_our_kernels_cannot_run_is_measured_with_the_others(measure):
    measured = measure(replace(SHAPES, gate=ActivationGate(gelu)))
    assert measured.search is None
    assert build_entry(measured, SHAPES, H100, lora_r=4).tiles is None
    assert measured.times_ms == {"eager": 9.0, "grouped_mm": 7.0}


def test_a_layer_that_fits_nowhere(measure):
    with pytest.raises(ConfigurationError) as caught:
        measure(triton_ms=math.inf, eager_ms=math.inf, grouped_mm_ms=math.inf)
    assert str(caught.value) == (
        "the layer does not fit in this GPU's memory with any backend; fewer tokens need less."
    )


def test_one_backend_alone_is_no_comparison(measure):
    with pytest.raises(ConfigurationError) as caught:
        measure(facts=V100)
    assert str(caught.value) == (
        "only eager can run this layer here: grouped_mm needs compute capability 8.0 or newer, and "
        "Tesla V100 has 7.0; triton needs compute capability 8.0 or newer, and Tesla V100 has 7.0; "
        "scattermoe is not installed; megablocks is not installed."
    )
