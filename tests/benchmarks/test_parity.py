"""What the parity benchmark covers, shows and complains about."""

from itertools import product

import pytest

from benchmarks import lora_parity
from benchmarks.parity import ACCUMULATION, CHECKPOINTING, find_violations, format_tables
from benchmarks.parity import parity_cases as cases
from tests.support.parity import LAYOUTS
from tests.support.tiny_models import FAMILIES

ROW = {
    "layout": "2 ranks ep2 shard",
    "model": "olmoe",
    "loss": 1e-7,
    "grad_norm": 2e-7,
    "first_gradient": 3e-7,
    "weight": 4e-7,
    "weight_from_fp64": 5e-7,
}
DRIFT = {"precision": "bf16", "model": "olmoe", "drift": 0.01, "stock_bf16_drift": 0.02}


def test_matrix_is_full_and_every_run_has_twenty_steps():
    seen = {(c.layout, c.model, c.accumulation, c.checkpointing) for c in cases()}
    assert seen >= set(product(LAYOUTS, FAMILIES, ACCUMULATION, CHECKPOINTING))
    assert {c.num_steps for c in cases()} == {20}
    assert len(set(cases())) == len(list(cases()))


def test_tables_show_the_worst_run():
    table = format_tables([ROW, ROW | {"loss": 8e-6}], [DRIFT])
    assert "8.0e-06" in table and "1.0e-07" not in table and "0.50" in table
    row = ROW | {"script": "fsdp1", "lora_rank": 4}
    table = lora_parity.format_table([row, row | {"grad_norm": 8e-6}])
    assert "8.0e-06" in table and "2.0e-07" not in table


@pytest.mark.parametrize("name", ["loss", "grad_norm", "first_gradient"])
def test_number_past_the_bound_is_named(name):
    assert find_violations([ROW], [DRIFT]) == []
    assert len(find_violations([ROW, ROW | {name: 1e-5}], [DRIFT])) == 1


def test_weights_may_be_far_from_fp32_but_not_from_fp64_too():
    assert find_violations([ROW | {"weight": 2e-5}], []) == []
    assert len(find_violations([ROW | {"weight": 2e-5, "weight_from_fp64": 1e-5}], [])) == 1


def test_drift_past_twice_stock_bf16_is_named():
    assert len(find_violations([], [DRIFT | {"drift": 0.04}])) == 1


def test_matrix_of_adapters_is_full():
    seen = [
        (script, c.model, c.layout.ep_size, c.lora_rank) for script, c in lora_parity.lora_cases()
    ]
    scripts, models = ("fsdp2", "fsdp1"), ("mixtral, wide", "qwen3_moe", "olmoe")
    assert set(seen) >= set(product(scripts, models, (1, 2, 4), (1, 4, 16)))
    assert len(set(lora_parity.lora_cases())) == len(seen)
    assert {(c.num_steps, c.layout.world_size) for _, c in lora_parity.lora_cases()} == {(20, 4)}


@pytest.mark.parametrize(
    ("name", "value"), [("loss", 1e-5), ("grad_norm", 1e-5), ("first_gradient", 1e-5)]
)
def test_adapters_past_the_bound_are_named(name, value):
    row = ROW | {"weight": 1e-4, "weight_excess": 3.0}  # Adam's noise, of stock's size
    assert lora_parity.find_violations([row]) == []
    assert len(lora_parity.find_violations([row, row | {name: value}])) == 1
    assert len(lora_parity.find_violations([row | {"weight_excess": 4.0}])) == 1
