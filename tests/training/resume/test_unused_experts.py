"""Experts that are never computed with: kept without expert parallelism, not kept with it."""

import pytest
import torch

from megablocks_utils.checkpoint.distributed_checkpoint import (
    MODEL_PREFIX,
    read_shards,
    write_shards,
)
from megablocks_utils.checkpoint.tensor_shards import BlockPlace
from megablocks_utils.config import parse_args, resolve_precision
from megablocks_utils.errors import CheckpointError
from megablocks_utils.fsdp.materialize import materialize
from megablocks_utils.training.model_source import ModelSource
from tests.support.tiny_families import save_tiny

COMPUTED, ALL = 8, 10  # of a tiny LongCat-Flash


def whole(tensor):
    return BlockPlace(tuple(tensor.shape), (0,) * tensor.dim()).shard(tensor)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, save_tiny("longcat_flash", folder)


def test_run_without_expert_parallelism_takes_them_from_the_model(base, tmp_path):
    folder, model = base
    shards, trained = {}, {}
    for name, parameter in model.named_parameters():
        kept = COMPUTED if name.endswith("experts.gate_up_proj") else len(parameter)
        trained[name] = parameter.detach() + 1
        shards[MODEL_PREFIX + name] = whole(trained[name][:kept])
        trained[name][kept:] = parameter.detach()[kept:]
    write_shards(shards, tmp_path / "checkpoint-1", None)

    options = {"model_name_or_path": folder, "data_path": "none", "output_dir": tmp_path / "out"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    config = parse_args(words, entry_point="fsdp2")
    source = ModelSource(folder, config, resolve_precision(config, "cpu"))
    fill = source.choose_fill(tmp_path / "checkpoint-1")
    materialize(source.model, fill, torch.device("cpu"))
    parameters = dict(source.model.named_parameters())
    wanted = {MODEL_PREFIX + name: whole(tensor.detach()) for name, tensor in parameters.items()}
    read_shards(wanted, tmp_path / "checkpoint-1")
    for name, parameter in parameters.items():
        assert torch.equal(parameter, trained[name]), name


@pytest.mark.parametrize("state", ["model.{}", "optimizer.{}.exp_avg"])
def test_run_with_expert_parallelism_leaves_them(tmp_path, state):
    first, second = (state.format(f"experts.{name}") for name in ("gate_up_proj", "down_proj"))
    stored = torch.randn(ALL, 4, 2)
    write_shards({first: whole(stored), second: whole(torch.randn(COMPUTED, 2, 2))}, tmp_path, None)
    local = torch.zeros(COMPUTED, 4, 2)
    read_shards({first: whole(local)}, tmp_path)
    assert torch.equal(local, stored[:COMPUTED])
    for name, rows in ((first, COMPUTED - 1), (second, COMPUTED + 1)):
        with pytest.raises(CheckpointError, match=f"its {name} has shape"):
            read_shards(
                {name: whole(torch.zeros(rows, *((4, 2) if rows < COMPUTED else (2, 2))))}, tmp_path
            )
