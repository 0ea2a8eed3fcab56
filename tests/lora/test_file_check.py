"""The check of written adapters sees what other trainers write: parts, zeros, scrambled experts."""

import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_files import export_adapter
from megablocks_utils.lora.apply import ChosenAdapters, apply_lora
from megablocks_utils.lora.file_check import (
    AdapterCheckError,
    check_files,
    count_trained,
    measure_experts,
)
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.shard_moe_utils import shard_moe
from tests.support.tiny_models import build_tiny_model

SETTINGS = LoraSettings(2, 4, ("q_proj",), {"gate_up_proj": 2, "down_proj": 2})
EXPERTS = "model.layers.1.mlp.experts"
KEY_A = f"base_model.model.{EXPERTS}.lora_A.weight"  # of down_proj
KEY_B = f"base_model.model.{EXPERTS}.lora_B.weight"
UNTRAINED = 2  # the expert without a gradient


def _train_and_write(rank, folder, ep_size):
    """Write an adapter whose experts all but one got gradients; return what the ranks measured."""
    model = build_tiny_model("mixtral")
    sharded = shard_moe(model, ep_size)
    apply_lora(model, sharded, ChosenAdapters(SETTINGS), dtype=torch.float32, seed=0)
    states, tensors = {}, []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(tensors)))
        square = torch.ones_like(parameter)
        if "experts" in name and "lora_B" in name:
            whole[UNTRAINED] = 0.0
            mine = sharded.mesh.get_local_rank("ep") * (4 // ep_size)
            if 0 <= UNTRAINED - mine < 4 // ep_size:
                square.to_local()[UNTRAINED - mine] = 0.0
            parameter.to_local().detach().copy_(whole[mine : mine + 4 // ep_size])
        elif "experts" in name:
            mine = sharded.mesh.get_local_rank("ep") * (4 // ep_size)
            parameter.to_local().detach().copy_(whole[mine : mine + 4 // ep_size])
        states[parameter] = {"exp_avg_sq": square}
        tensors.append((name, whole))
    measured = measure_experts(sharded, SETTINGS, states)
    export_adapter(
        SETTINGS,
        None,
        tensors,
        folder,
        base_model=partial(build_tiny_model, "mixtral"),
        base_model_name="x",
        is_writer=rank == 0,
    )
    return measured


@pytest.fixture(scope="module")
def written(ranks4, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return folder, ranks4.run(_train_and_write, folder, 2)


@pytest.fixture
def change(written, tmp_path):
    """Return a function that writes the adapter with some tensors changed, and checks it."""
    folder, measured = written

    def change_and_check(**changed):
        tensors = load_file(folder / ADAPTER_WEIGHTS_NAME) | changed.pop("tensors", {})
        tensors = {key: x for key, x in tensors.items() if x is not None}
        save_file(tensors, tmp_path / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
        config = (folder / "adapter_config.json").read_text()
        (tmp_path / "adapter_config.json").write_text(config)
        check_files(tmp_path, build_tiny_model("mixtral"), measured[0] | changed)

    return change_and_check


def test_every_rank_measures_the_same_and_the_file_has_it(written, change):
    _, measured = written
    assert count_trained(measured[0]) == (12, 16)  # 3 of 4 experts, 2 projections, 2 layers
    for other in measured[1:]:
        for name, norms in measured[0].items():
            assert torch.equal(norms.lora_a, other[name].lora_a)
            assert torch.equal(norms.lora_b, other[name].lora_b)
            assert norms.has_moved.tolist() == [True, True, False, True]
    change()


def _zeros_but_first_rank(stored):
    """Keep what the first of two ranks holds, experts 0 and 1, of B (out, r * E)."""
    kept = stored.clone().unflatten(1, (-1, 4))
    kept[:, :, 2:] = 0.0
    return kept.flatten(1)


SCRAMBLES = {
    "one rank's part and zeros": (KEY_B, _zeros_but_first_rank, "expert 3, differs", "B"),
    "B with the experts' columns together": (
        KEY_B,
        lambda b: b.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1),
        "experts 0, 1, 2, 3, differs",
        "B",
    ),
    "two experts exchanged": (
        KEY_A,
        lambda a: a.unflatten(0, (4, -1))[[0, 3, 2, 1]].flatten(0, 1),
        "experts 1, 3, differs",
        "A",
    ),
    "one value lost": (
        KEY_A,
        lambda a: torch.cat([a[:1] * 0.999, a[1:]]),
        "expert 0, differs",
        "A",
    ),
}


@pytest.mark.parametrize("name", SCRAMBLES)
def test_a_file_that_is_not_what_was_trained_is_refused(written, change, name):
    key, scramble, found, side = SCRAMBLES[name]
    stored = load_file(written[0] / ADAPTER_WEIGHTS_NAME)[key]
    with pytest.raises(AdapterCheckError) as refusal:
        change(tensors={key: scramble(stored).contiguous()})
    assert str(refusal.value) == (
        f"the adapter of {EXPERTS}.down_proj, {found} from what was trained in lora_{side}"
    )


def test_a_trained_expert_whose_adapter_is_zero_is_refused(written, change):
    """Also where the ranks themselves hold zeros: then gradients went nowhere."""
    _, measured = written
    name = f"{EXPERTS}.down_proj"
    norms = measured[0][name]
    moved = torch.ones(4, dtype=torch.bool)
    claimed = type(norms)(norms.lora_a, norms.lora_b, moved)
    with pytest.raises(AdapterCheckError) as refusal:
        change(**{name: claimed})
    assert str(refusal.value) == (
        f"the adapter of {name}, expert {UNTRAINED}, was trained but is zero in lora_B"
    )


def test_a_missing_tensor_is_refused(change):
    with pytest.raises(CheckpointError, match=re.escape(KEY_B)):
        change(tensors={KEY_B: None})


def _refuse_and_keep(rank, folder, refusal_type):
    model = build_tiny_model("mixtral")
    sharded = shard_moe(model, 1)
    apply_lora(model, sharded, ChosenAdapters(SETTINGS), dtype=torch.float32, seed=0)
    tensors = [
        (name, getattr(p, "full_tensor", lambda p=p: p)().detach())
        for name, p in model.named_parameters()
        if p.requires_grad
    ]

    def refuse(written_folder):
        assert (written_folder / ADAPTER_WEIGHTS_NAME).is_file()
        raise refusal_type("it is wrong")

    with pytest.raises(refusal_type) as refusal:
        export_adapter(
            SETTINGS,
            None,
            tensors,
            folder,
            base_model=partial(build_tiny_model, "mixtral"),
            base_model_name="x",
            is_writer=True,
            check=refuse,
        )
    return str(refusal.value)


@pytest.mark.parametrize("refusal_type", [AdapterCheckError, CheckpointError])
def test_a_refused_adapter_is_kept_where_nobody_takes_it_for_a_good_one(
    ranks1, tmp_path, refusal_type
):
    message = ranks1.run(_refuse_and_keep, tmp_path, refusal_type)[0]
    assert message == f"it is wrong; the files are in {tmp_path / 'refused_adapter'}"
    assert [path.name for path in tmp_path.iterdir()] == ["refused_adapter"]
    kept = sorted(path.name for path in (tmp_path / "refused_adapter").iterdir())
    assert kept == ["adapter_config.json", ADAPTER_WEIGHTS_NAME]
