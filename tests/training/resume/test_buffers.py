"""Persistent buffers are a part of a checkpoint: resumed, and exported, as they were saved."""

import shutil

import pytest
import torch

from megablocks_utils.checkpoint.distributed_checkpoint import (
    MODEL_PREFIX,
    read_stored_tensors,
    write_shards,
)
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.stored_model import StoredModel
from megablocks_utils.errors import CheckpointError
from megablocks_utils.training.resume.run_state import RunState
from tests.support.tiny_families import save_tiny

FAMILIES = ("deepseek_v3", "minimax_m2", "deepseek_v4", "gemma4_text")


def state_of(model):
    """Of a run that trains nothing, so that buffers alone are its state."""
    model.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": []}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return RunState(model, optimizer, scheduler)


def buffers_of(model):
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n: t.clone() for n, t in model.state_dict().items() if n not in parameters}


@pytest.mark.parametrize("family", FAMILIES)
def test_they_come_back_and_are_exported(tmp_path, family):
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint-1"
    model = save_tiny(family, base)
    state, saved = state_of(model), buffers_of(model)
    assert saved
    write_shards(state.shards(), checkpoint, None)
    for name in saved:
        model.get_buffer(name).zero_()
    state.restore(checkpoint, 1)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in buffers_of(model).items())

    stored = {
        name.removeprefix(MODEL_PREFIX): spec
        for name, spec in read_stored_tensors(checkpoint).items()
    }
    on_meta = build_model_on_meta(base)
    record = {"folder": str(base), "num_passed_through": 0}
    source = StoredModel(checkpoint, stored, on_meta, record)
    tensors = dict(source.tensors(lambda _: None))
    assert tensors.keys() == model.state_dict().keys() - model.all_tied_weights_keys.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name]), name

    shutil.rmtree(base)
    with pytest.raises(CheckpointError) as error:
        StoredModel(checkpoint, stored, on_meta, record)
    assert f"to its base: the model folder {base} does not exist" in str(error.value)
