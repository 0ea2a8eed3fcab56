"""What training on text gives no gradient stays as it is, byte for byte."""

import pytest
import torch

from megablocks_utils.training.step.small_model import build_small_model
from megablocks_utils.training.step.unused_parameters import find_unused
from tests.support.fsdp1_run import train_fsdp1
from tests.support.tiny_families import build_tiny, save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "part"), [("ernie4_5_vl_moe", ".vision_moe."), ("deepseek_v32", ".indexer.")]
)
def test_unused_is_what_a_backward_pass_of_the_model_does_not_reach(family, part):
    model = build_tiny(family)
    model.set_experts_implementation("eager")
    model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits.sum().backward()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    found = find_unused(model, build_small_model(model, CPU), has_aux_loss=False)
    assert set(found) == wanted
    assert any(part in name for name in found)


def test_what_one_entry_for_128_tokens_is_made_with_is_used():
    kinds = ["sliding_attention", "heavily_compressed_attention"] * 2
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    model = build_tiny("deepseek_v4", layer_types=kinds, compress_rates=rates)
    assert any(".compressor." in name for name, _ in model.named_parameters())
    assert find_unused(model, build_small_model(model, CPU), has_aux_loss=False) == ()


def test_weight_decay_does_not_move_it(ranks2, tmp_path):
    """FSDP1 has a gradient of zeros for what shares a flat parameter with what is trained."""
    before = dict(save_tiny("deepseek_v32", tmp_path / "model").named_parameters())
    (tmp_path / "data.json").write_text('[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]')
    options = {
        "model_name_or_path": tmp_path / "model",
        "data_path": tmp_path / "data.json",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "learning_rate": 0.1,
        "weight_decay": 0.5,
    }
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    after = ranks2.run(train_fsdp1, argv)[0].weights
    unmoved = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert unmoved == {name for name in before if ".indexer." in name}
