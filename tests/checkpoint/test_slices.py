"""Any part of a parameter is what it is in the whole one, and only its rows are read."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from tests.support.reads import recorded_reads
from tests.support.tiny_models import save_tiny_model

NUM_PARTS = 12  # of each parameter
NORM = "model.norm.weight"
KINDS = {
    "per_expert": {"family": "mixtral"},
    "fused": {"family": "mixtral", "fused": True},
    "qwen names": {"family": "qwen3_moe", "mlp_only_layers": [0]},
}


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request, tmp_path_factory):
    """An index, its reader and every whole parameter by name, in fp32."""
    folder = tmp_path_factory.mktemp("slices")
    options = dict(KINDS[request.param])
    save_tiny_model(options.pop("family"), folder, **options)
    index = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return index, SliceReader(index, ModelLayout(model, index)), dict(model.named_parameters())


def random_part(shape, generator):
    """Return offsets and sizes of a part: often one that ends at an edge, sometimes empty."""
    offsets, sizes = [], []
    for size in shape:
        ends = sorted(generator.choice((0, size, generator.randrange(size + 1))) for _ in range(2))
        offsets.append(ends[0])
        sizes.append(ends[1] - ends[0])
    return tuple(offsets), tuple(sizes)


def cut(whole, offsets, sizes):
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def wanted_bytes(name, whole, sizes):
    """Return the stored bytes of the rows that a part lies in; columns are not read apart."""
    num_rows = sizes[0] * sizes[1] if ".experts." in name else sizes[0]
    row = whole[0, 0] if ".experts." in name else whole[0]
    return 0 if 0 in sizes else num_rows * row.numel() * whole.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_part_equals_the_same_part_of_the_whole(checkpoint, dtype):
    _, reader, parameters = checkpoint
    generator = random.Random(0)
    num_filled = 0
    for name, whole in parameters.items():
        for _ in range(NUM_PARTS):
            offsets, sizes = random_part(whole.shape, generator)
            local = torch.full(sizes, float("nan"), dtype=dtype)
            with recorded_reads() as reads:
                reader.fill_local(name, local, offsets)
            assert torch.equal(local, cut(whole, offsets, sizes).to(dtype)), (name, offsets, sizes)
            assert reads.num_bytes == wanted_bytes(name, whole, sizes), (name, offsets, sizes)
            assert len(set(reads.spans)) == len(reads.spans)
            num_filled += local.numel() > 0
    assert num_filled > 100


def test_a_part_may_lie_apart_in_memory(checkpoint):
    _, reader, parameters = checkpoint
    name = "model.layers.1.mlp.experts.gate_up_proj"
    target = torch.zeros(192, 4, 64).transpose(0, 1)
    reader.fill_local(name, target, (0, 0, 0))
    assert torch.equal(target, parameters[name])


def test_a_part_past_the_end_is_refused(checkpoint):
    index, reader, _ = checkpoint
    file = index.path(NORM)
    with pytest.raises(CheckpointError) as error:
        reader.fill_local(NORM, torch.empty(2), (63,))
    assert str(error.value) == f"rows 63:65 of {NORM} were asked for, but {file} has 64"
    key = "model.embed_tokens.weight"
    with pytest.raises(CheckpointError) as error:
        reader.fill_local(key, torch.empty(1, 60), (0, 5))
    rows = f"{key} in {index.path(key)} has rows of shape (64,)"
    assert str(error.value) == f"{rows}, wanted is (60,) at (5,)"


def test_only_who_reads_a_bad_value_meets_it(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False, fused=True)
    file, key = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(file)
    tensors[key][2, 10, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    index = open_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    reader = SliceReader(index, ModelLayout(model, index))
    reader.fill_local(key, torch.empty(2, 64, 96), (0, 0, 0))
    reader.fill_local(key, torch.empty(2, 10, 96), (2, 0, 0))
    with pytest.raises(CheckpointError) as error:
        reader.fill_local(key, torch.empty(2, 1, 96), (2, 10, 0))
    assert str(error.value) == f"{key} in {file} holds 1 non-finite value"
