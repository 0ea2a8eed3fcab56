"""Loads of experts: those of the global batch, whoever runs it, and once for each step."""

import json
from dataclasses import replace

import pytest
import torch

from megablocks_utils.config import RunConfig
from megablocks_utils.errors import CheckpointError
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.training.data.batches import Packing, collate_examples
from megablocks_utils.training.report.expert_load import describe_layer, read_loads
from megablocks_utils.training.report.load_summary import LoadSummary, report_loads
from megablocks_utils.training.resume.resume_point import ResumePoint, _check_loads
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.step.model_probe import ModelProbe, apply_router_options
from megablocks_utils.training.step.packing_probe import PackingChoice
from tests.support.parity import TWO_BATCHES, Layout, ParityFolder
from tests.support.resuming import make_run, resume, run_and_save
from tests.support.tiny_families import build_tiny
from tests.training.step.test_router_balance import LENGTHS, count_stock, make_examples

CPU = torch.device("cpu")


def measure(model, packing, micro_batches, every=1):
    """The loads of one step, whose layers are recomputed."""
    probe = ModelProbe(PackingChoice(packing, "eager", "a test", {}))
    config = RunConfig(expert_load_steps=every)
    hooks = apply_router_options(config, model, probe, CPU, lambda *_: None)
    apply_gradient_checkpointing(model, "full")
    hooks.loads.start_step(3)
    for rows in micro_batches:
        batch = collate_examples(make_examples(), rows, packing)
        loss = compute_micro_batch_loss(model, batch, LossWeights(1, 1), CPU, hooks)
        loss.objective.backward()
    return hooks.loads.finish_step(3)


def stock_margins(model):
    """Mean of first less second weight, by layer."""
    gaps = {name: [] for name in find_expert_modules(model)}

    def add(name, args):
        weights = args[2].sort(descending=True).values
        gaps[name].append(weights[:, 0] - weights[:, 1])

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args))
        for name, module in find_expert_modules(model).items()
    ]
    with torch.no_grad():
        for ids, _ in (make_examples()[i] for i in range(len(LENGTHS))):
            model(input_ids=torch.tensor(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).mean().item() for name, parts in gaps.items()}


@pytest.mark.parametrize(
    ("packing", "micro_batches"),
    [(Packing.PADDED, [(0, 1, 2, 3)]), (Packing.POSITIONS, [(0, 1), (3, 2), ()])],
)
def test_shares_are_those_of_the_examples_alone(packing, micro_batches):
    """Recomputation, accumulation, padding and a dummy change nothing."""
    model = build_tiny("qwen3_moe").train()
    wanted, margins = count_stock(model), stock_margins(model)
    loads = measure(model, packing, micro_batches)
    assert [layer.layer for layer in loads.layers] == list(wanted)
    for layer in loads.layers:
        counts = wanted[layer.layer].double()
        assert layer.rows == counts.sum() == 2 * sum(LENGTHS)
        assert layer.share == pytest.approx((counts / counts.sum()).tolist(), abs=1e-8)
        assert layer.max_over_mean == pytest.approx((counts.max() / counts.mean()).item())
        assert layer.dead_experts == tuple((counts == 0).nonzero().flatten().tolist())
        assert layer.top1_margin == pytest.approx(margins[layer.layer], abs=1e-6)
        assert layer.rank_max_over_mean == 1
    assert measure(model, packing, micro_batches, every=2) is None


def test_experts_that_are_given_weighted_tokens_are_measured_too():
    """They are not told the routing: what is not zero is routed."""
    model = build_tiny("llama4_text").train()
    loads = measure(model, Packing.PADDED, [(0, 1, 2, 3)])
    top_k = model.config.num_experts_per_tok
    assert {layer.rows for layer in loads.layers} == {top_k * sum(LENGTHS)}
    assert all(layer.top1_margin is None for layer in loads.layers)


def test_the_worst_group_of_ranks_counts_and_dead_experts_are_named():
    layer = describe_layer("experts", [6, 0, 2, 8], [[6, 2], [0, 8], [0, 0]], None)
    assert (layer.share, layer.dead_experts) == ((0.375, 0, 0.125, 0.5), (1,))
    assert (layer.max_over_mean, layer.rank_max_over_mean) == (2, 2)
    assert layer.entropy == pytest.approx(0.974315, abs=1e-6)


@pytest.fixture(scope="module")
def runs(ranks1, ranks4, tmp_path_factory):
    """Two steps on ep 2 x dp 2, the second resumed by the other script, on one rank, and where both
    ranks of a group have the same rows.
    """
    models = ParityFolder(tmp_path_factory.mktemp("models"))
    pools, folder = {1: ranks1, 4: ranks4}, tmp_path_factory.mktemp("runs")
    four = make_run(
        "fsdp2",
        Layout(4, 2),
        *("--expert_load_steps", "1"),
        saved_step=1,
        num_steps=2,
        num_examples=TWO_BATCHES,  # the second step leaves three ranks of four a dummy
        accumulation=2,
        checkpointing="True",
    )
    saved = run_and_save(pools, models, four, folder / "four")
    other = replace(four, script="fsdp1")
    other = replace(other, case=replace(four.case, layout=Layout(4, 2, "replicate")))
    resume(pools, models, other, saved.checkpoint, folder / "resumed")
    one = replace(four, case=replace(four.case, layout=Layout(1, 0), accumulation=1))
    run_and_save(pools, models, one, folder / "one")
    groups = replace(four, case=replace(four.case, layout=Layout(4, 2, groups=2, tp_size=2)))
    run_and_save(pools, models, groups, folder / "groups")
    return folder


def without_ranks(loads):
    return [replace(layer, rank_max_over_mean=1) for layer in loads.layers]


@pytest.mark.parametrize("name", ["four", "groups"])
def test_ranks_measure_what_one_process_does(runs, name):
    four, one = (list(read_loads(runs / n / "expert_load.jsonl")) for n in (name, "one"))
    assert [loads.step for loads in four] == [1, 2]
    for found, wanted in zip(without_ranks(four[0]), without_ranks(one[0]), strict=True):
        assert found.top1_margin == pytest.approx(wanted.top1_margin, abs=1e-6)
        assert replace(found, top1_margin=0) == replace(wanted, top1_margin=0)
    assert [layer.rows for layer in four[1].layers] == [layer.rows for layer in one[1].layers]
    gaps = []
    for layer in four[0].layers:
        half = len(layer.share) // 2
        of_both = 2 * max(sum(layer.share[:half]), sum(layer.share[half:]))
        gaps.append(layer.rank_max_over_mean - of_both)
    assert min(gaps) > -1e-6 and max(gaps) > 1e-3  # one group is worse than both together
    sentence = report_loads(runs / name, 2, 1.25)
    assert "the others waited for a rank with 1." in sentence and "plan takes 1.25" in sentence
    assert (runs / "four" / "expert_load.png").exists()


def test_a_resumed_run_holds_every_step_once(runs):
    whole, resumed = (runs / name / "expert_load.jsonl" for name in ("four", "resumed"))
    lines = [path.read_text().splitlines() for path in (whole, resumed)]
    num_layers = len(next(read_loads(whole)).layers)
    assert lines[1][:num_layers] == lines[0][:num_layers]
    assert [loads.step for loads in read_loads(resumed)] == [1, 2]
    assert [[x.rows for x in loads.layers] for loads in read_loads(resumed)] == [
        [x.rows for x in loads.layers] for loads in read_loads(whole)
    ]
    for step in (json.loads(x) for x in (runs / "resumed" / "metrics.jsonl").open()):
        assert step["moe_load_max_over_mean"] > 1


@pytest.mark.parametrize("spoil", [lambda text: text * 2, lambda text: '{"step": 1}\n'])
def test_loads_that_are_not_of_the_steps_done_are_refused(runs, tmp_path, spoil):
    text = (runs / "four" / "checkpoint-1" / "expert_load.jsonl").read_text()
    (tmp_path / "expert_load.jsonl").write_text(text + text.replace('"step": 1', '"step": 2'))
    manifest = {"step": 2, "files": {"expert_load.jsonl": {}}}
    _check_loads(ResumePoint(tmp_path, manifest))
    (tmp_path / "expert_load.jsonl").write_text(spoil((tmp_path / "expert_load.jsonl").read_text()))
    with pytest.raises(CheckpointError, match=r"expert_load\.jsonl"):
        _check_loads(ResumePoint(tmp_path, manifest))


def test_a_run_without_a_measured_step_says_so():
    assert "none measured" in LoadSummary().describe(2, 1.25)
