"""Examples of a batch are kept apart, in the way that a probe has shown to be right."""

from functools import partial

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from megablocks_utils.attention.implementation import set_implementation
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.data.batches import Packing, collate_examples
from megablocks_utils.training.step import forward
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.step.packing_probe import choose_packing
from megablocks_utils.training.step.small_model import build_small_model
from tests.support.tiny_families import build_tiny
from tests.support.tokenized import examples_of

CPU = torch.device("cpu")
CHOSEN = {
    ("mixtral", "auto"): (Packing.POSITIONS, "varlen"),
    ("mixtral", "own"): (Packing.POSITIONS, "sdpa"),
    ("llama4_text", "auto"): (Packing.POSITIONS, "varlen"),  # chunks
    ("mimo_v2_flash", "auto"): (Packing.POSITIONS, "varlen"),  # sinks, windows, heads of two sizes
    ("gpt_oss", "own"): (Packing.MASKS, "eager"),
    # delta rule: its kernels are not here
    ("qwen3_5_moe_text", "auto"): (Packing.PADDED, "varlen"),
    ("deepseek_v4", "auto"): (Packing.PADDED, "eager"),  # compressed keys cross examples
}
LENGTHS = (5, 26, 11)


def choose(model, packing="auto", batch_size=2, attention="own", packing_length=None):
    small = partial(build_small_model, model, CPU)
    return choose_packing(
        small,
        packing=packing,
        batch_size=batch_size,
        device=CPU,
        attention=attention,
        packing_length=packing_length,
    )


def make_examples():
    generator = torch.Generator().manual_seed(1)
    encoded = []
    for length in LENGTHS:
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        encoded.append((ids, [-100] * (length // 3) + ids[length // 3 :]))
    return examples_of(encoded)


def stock_step(model, examples):
    """Loss sum and gradients of transformers' own loss, one example at a time."""
    total = 0.0
    for ids, labels in (examples[i] for i in range(len(examples))):
        ids, labels = torch.tensor(ids)[None], torch.tensor(labels)[None]
        loss = model(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("model_type", "attention"), CHOSEN)
def test_a_batch_has_the_loss_and_every_gradient_of_its_examples_alone(model_type, attention):
    model, examples = build_tiny(model_type), make_examples()
    loss_sum, wanted = stock_step(model, examples)
    model.zero_grad()
    choice = choose(model, attention=attention)
    assert (choice.packing, choice.attention) == CHOSEN[model_type, attention]
    set_implementation(model, choice.attention)
    apply_gradient_checkpointing(model.train(), "full")
    batch = collate_examples(examples, range(len(examples)), choice.packing)
    loss = compute_micro_batch_loss(model, batch, LossWeights(1, 1), CPU)
    loss.objective.backward()
    assert loss.token_loss_sum.item() == pytest.approx(loss_sum, rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted and wanted[name].norm() > 1e-9:
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < 2e-5, name


def test_a_head_keeps_its_size_where_rotary_sections_must_fit_it():
    """This class has no size of heads in its config, and sections of a fixed size in its code."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["ernie4_5_vl_moe"]())
    assert choose(model).packing is Packing.MASKS


def test_a_mask_that_is_dropped_is_noticed(monkeypatch):
    monkeypatch.setattr(forward, "create_masks_for_generate", lambda *args, **kwargs: None)
    choice = choose(build_tiny("gpt_oss"))
    assert choice.packing is Packing.PADDED
    assert choice.tried["masks, eager"] > 0.1


def test_packing_is_refused_with_what_was_measured():
    with pytest.raises(ConfigurationError) as caught:
        choose(build_tiny("qwen3_5_moe_text"), packing="True")
    assert "packing is True, but it must be False or auto" in str(caught.value)
    assert "packed by positions, sdpa attention (" in str(caught.value)


def test_packed_rows_are_tried_also_one_a_batch_and_refused_where_wrong():
    model = build_tiny("mixtral")
    assert choose(model, batch_size=1, packing_length=64).packing is Packing.POSITIONS
    with pytest.raises(ConfigurationError) as caught:
        choose(build_tiny("deepseek_v4"), batch_size=1, packing_length=64)
    assert caught.value.as_options().startswith(
        "--packing_length is 64, but it must be left out for a model of type deepseek_v4: in a row "
        "of several examples logits differ from those of each example alone: packed by positions, "
    )


def test_one_example_a_batch_needs_no_probe():
    choice = choose_packing(None, packing="True", batch_size=1, device=CPU)
    assert choice.packing is Packing.ALONE


def test_one_example_takes_varlen_where_the_models_own_attention_keeps_all_scores():
    model = build_tiny("gpt_oss")
    choice = choose_packing(
        partial(build_small_model, model, CPU),
        packing="auto",
        batch_size=1,
        device=CPU,
        attention="auto",
        own_attention=model.config._attn_implementation,
    )
    assert (choice.packing, choice.attention) == (Packing.ALONE, "varlen")


def test_varlen_by_name_is_refused_where_it_is_wrong():
    with pytest.raises(ConfigurationError) as caught:
        choose(build_tiny("axk2"), batch_size=1, attention="varlen")
    assert "attn_implementation is varlen, but it must be auto for a model of type" in str(
        caught.value
    )
    assert "varlen attention (the model computes with the mask itself)" in str(caught.value)


def test_auto_leaves_dropout_to_the_models_own_attention():
    choice = choose(build_tiny("mixtral", attention_dropout=0.1), attention="auto")
    assert choice.attention == "sdpa"
    assert "varlen attention (attention_dropout is 0.1)" in choice.describe()
