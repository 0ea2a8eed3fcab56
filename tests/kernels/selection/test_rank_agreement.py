"""All ranks run what rank 0 has selected, whatever each has measured or has for a GPU."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from megablocks_utils.config import parse_args
from megablocks_utils.errors import ConfigurationError, MissingKernelError, UserError
from megablocks_utils.kernels.gate import SWIGLU, KnownGate
from megablocks_utils.kernels.selection import rank_agreement
from megablocks_utils.kernels.selection.backend_selection import select_backend
from megablocks_utils.kernels.selection.rank_agreement import select_for_all_ranks
from megablocks_utils.kernels.tuning.measurements import store_entry
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_spec
from megablocks_utils.moe.expert_use import ExpertUse
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.shard_moe_utils import shard_moe
from megablocks_utils.training.setup import build_setup
from tests.kernels.facts import H100, V100, put_packages, put_triton
from tests.kernels.measured import SHAPES, TILES, measured
from tests.support.tiny_models import build_tiny_model, save_tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

OTHER_TILES = replace(TILES, linear=replace(TILES.linear, num_stages=2))


def _choose(rank, folder, kernel="auto", devices=(H100, H100), has_triton=(True, True)):
    """Choose on ranks that have a folder of measurements, a GPU and a Triton each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGABLOCKS_UTILS_CACHE", f"{folder}/{rank}")
        patch.setattr(rank_agreement, "read_device_facts", lambda _: devices[rank])
        (put_triton if has_triton[rank] else put_packages)(patch)
        try:
            loaded = select_for_all_ranks(kernel, SHAPES)
        except UserError as error:
            return type(error), str(error)
        tiles = loaded.run.keywords["tiles"] if isinstance(loaded.run, partial) else None
        return loaded.name, loaded.reason, tiles


@pytest.fixture
def store(tmp_path):
    return lambda rank, entry: store_entry(entry, tmp_path / str(rank) / "kernels.json")


def test_rank_0s_measurement_counts(ranks2, tmp_path, store):
    store(0, measured())
    first, second = ranks2.run(_choose, tmp_path)
    assert first == second
    assert first[0] == "triton" and first[2] == TILES


def test_other_ranks_measurements_do_not_count(ranks2, tmp_path, store):
    store(1, measured())
    first, second = ranks2.run(_choose, tmp_path)
    assert first == second
    assert first[0] == "grouped_mm" and "no kernel was measured here" in first[1]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_all_take_rank_0s_tiles(ranks2, tmp_path, store, kernel):
    store(0, measured(tiles=TILES))
    store(1, measured({"grouped_mm": 9.0, "triton": 12.0}, tiles=OTHER_TILES))
    first, second = ranks2.run(_choose, tmp_path, kernel)
    assert first == second
    assert first[0] == "triton" and first[2] == TILES


def test_a_damaged_file_of_another_rank_does_not_matter(ranks2, tmp_path, store):
    store(0, measured())
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "kernels.json").write_text("damaged")
    first, second = ranks2.run(_choose, tmp_path)
    assert first == second and first[0] == "triton"


def test_a_rank_that_cannot_run_it_ends_all(ranks2, tmp_path, store):
    store(0, measured())
    sentence = "rank 0 has selected triton for all ranks, but on rank 1 {}."
    old = (
        ConfigurationError,
        sentence.format("triton needs compute capability 8.0 or newer, and Tesla V100 has 7.0"),
    )
    assert ranks2.run(_choose, tmp_path, devices=(H100, V100)) == [old] * 2
    missing = (
        ConfigurationError,
        sentence.format("triton is not installed"),
    )
    assert ranks2.run(_choose, tmp_path, has_triton=(True, False)) == [missing] * 2


def test_what_rank_0_meets_ends_all(ranks2, tmp_path):
    missing = (
        MissingKernelError,
        "kernel is triton, but triton is not installed; install it with: pip install triton",
    )
    assert ranks2.run(_choose, tmp_path, "triton", has_triton=(False, True)) == [missing] * 2


def _shard(rank):
    """Split a model on ranks that name different kernels; what its layers run on."""
    seen = []

    def select(kernel, shapes, device, others):
        assert not others
        seen.append(shapes)
        return select_backend(kernel, shapes, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_agreement, "select_backend", select)
        sharded = shard_moe(
            build_tiny_model("mixtral"),
            ep_size=2,
            kernel=("eager", "grouped_mm")[rank],
            expert_mode="lora",
            tokens_per_rank=100,
        )
    runs = {module.backend.__name__ for module in sharded.expert_modules.values()}
    return sharded.kernel.name, runs, seen


def test_shard_moe_asks_rank_0(ranks2):
    first, second = ranks2.run(_shard)
    assert first[:2] == second[:2] == ("eager", {"run_experts_eager"})
    assert second[2] == []
    (shapes,) = first[2]
    assert (shapes.mode, shapes.num_local_experts, shapes.top_k) == ("lora", 2, 1)
    assert (shapes.num_rows, shapes.gate) == (200, SWIGLU)


def _set_up(rank, folder, line):
    """Build a run, and return what its kernel was chosen by."""
    words = f"--model_name_or_path {folder}/model --data_path {folder}/data.json {line}".split()
    seen = []

    def select(kernel, shapes, device, others):
        seen.append((kernel, shapes))
        return select_backend("auto", shapes, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_agreement, "select_backend", select)
        config = parse_args(words, entry_point="fsdp2")
        setup = build_setup(config, LaunchEnvironment(), torch.device("cpu"))
    return seen[0], setup.schedule.examples.lengths.tolist()


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("--use_megablocks_sharding True", "full"),
        ("--use_megablocks_sharding True --use_lora attn-only", "frozen"),
        ("--use_lora mlp-only", "lora"),
    ],
)
def test_a_run_says_what_it_trains_and_how_many_rows_there_will_be(ranks1, tmp_path, line, mode):
    save_tiny_model("mixtral", tmp_path / "model", sharded=False, vocab_size=400)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    records = [{"instruction": "say it", "output": "yes " * n} for n in (1, 9, 20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = f"{line} --kernel triton --per_device_train_batch_size 4 --precision bf16"
    (((kernel, shapes), lengths),) = ranks1.run(_set_up, tmp_path, options)
    assert kernel == "triton" and len(set(lengths)) == 3
    mean = sum(lengths) / len(lengths)
    assert shapes.num_rows == 2 * round(4 * mean)
    assert (shapes.mode, shapes.dtype, shapes.num_local_experts) == (mode, torch.bfloat16, 4)


def test_what_the_choice_depends_on():
    model = build_tiny_model("qwen3_moe")
    module = next(iter(find_expert_modules(model).values()))
    spec, dtype = read_expert_spec(module), torch.float32
    use = ExpertUse("cpu", None, "frozen", 50)
    alone, apart = (use.shapes(spec, dtype, 2, ep_size) for ep_size in (1, 4))
    assert (alone.hidden_size, alone.intermediate_size, alone.dtype) == (64, 96, torch.float32)
    assert (alone.num_local_experts, alone.top_k, alone.num_rows) == (4, 2, 100)
    assert (apart.num_local_experts, apart.top_k, apart.num_rows) == (1, 1, 100)
    assert (alone.mode, alone.device_type, alone.has_adapters) == ("frozen", "cpu", False)
    unknown = replace(use, compute_dtype=torch.bfloat16, tokens_per_rank=None)
    shapes = unknown.shapes(spec, dtype, 2, 1)
    assert (shapes.dtype, shapes.num_rows) == (torch.bfloat16, None)
    assert use.shapes(spec, dtype, None, 1).num_rows is None
    module.act_fn = nn.GELU()
    assert not isinstance(read_expert_spec(module).gate, KnownGate)
