"""A layer to time backends on: what is trained in which mode, and rows for everybody."""

from dataclasses import replace

import pytest
import torch

from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.gate import SWIGLU, Activation, KnownActivation
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.random_layer import build_random_layer
from tests.support.compare import relative_error

SHAPES = ExpertShapes(16, 24, torch.float32, "cpu", num_local_experts=4, top_k=2, num_rows=2 * 33)
WEIGHTS = [(4, 48, 16), (4, 16, 24)]
FACTORS = [(4, 4, 16), (4, 48, 4), (4, 4, 24), (4, 16, 4)]


@pytest.mark.parametrize(
    ("mode", "trained"), [("full", WEIGHTS), ("frozen", []), ("lora", FACTORS)]
)
def test_what_gets_gradients(mode, trained):
    layer = build_random_layer(replace(SHAPES, mode=mode), lora_r=4, device="cpu")
    assert [tuple(leaf.shape) for leaf in layer.leaves] == [(33, 16), (33, 2), *trained]
    one, other = layer.step(run_experts_eager), layer.step(run_experts_grouped_mm)
    # Both in fp32; sums of 16 to 66 numbers: some units of its last place.
    for ours, wanted in zip(one, other, strict=True):
        assert wanted.norm() > 0 and relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("has_gate", [True, False])
def test_experts_are_stored_as_the_models_are(has_gate):
    gate = SWIGLU if has_gate else KnownActivation(Activation.RELU_SQUARED)
    shapes = replace(SHAPES, gate=gate, has_gate=has_gate, has_bias=True, is_transposed=True)
    layer = build_random_layer(shapes, lora_r=4, device="cpu")
    outputs = 48 if has_gate else 24
    shapes = [(33, 16), (33, 2), (4, 16, outputs), (4, 24, 16), (4, outputs), (4, 16)]
    assert [tuple(leaf.shape) for leaf in layer.leaves] == shapes
    one, other = layer.step(run_experts_eager), layer.step(run_experts_grouped_mm)
    for ours, wanted in zip(one, other, strict=True):
        assert wanted.norm() > 0 and relative_error(ours, wanted) < 1e-5


def test_rows_of_other_ranks_come_one_by_one_without_weights():
    layer = build_random_layer(replace(SHAPES, top_k=1), lora_r=4, device="cpu")
    assert layer.top_k_weights is None and len(layer.tokens) == 66
    assert len(layer.step(run_experts_grouped_mm)) == 4


def test_no_token_has_an_expert_twice_and_all_experts_have_rows():
    layer = build_random_layer(SHAPES, lora_r=4, device="cpu")
    counts = layer.order.tokens_per_expert
    assert counts.sum() == 66 and counts.min() > 0
    experts = torch.arange(4).repeat_interleave(counts)[layer.order.inverse].view(33, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
