"""A configuration that says more than plain LoRA, or nothing, is refused in one sentence."""

import pytest

from megablocks_utils.lora.adapter_reader import open_adapter
from tests.support.tiny_adapters import CONFIG, edit_settings


def test_no_configuration(refusal, fused):
    (fused / CONFIG).unlink()
    assert refusal(fused) == f"the adapter folder {fused} has no {CONFIG}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not valid JSON: Expecting property name enclosed in double quotes: line 1"),
        ("[]", "holds no settings: its JSON is not an object"),
    ],
)
def test_a_configuration_that_is_no_settings(refusal, fused, text, fault):
    (fused / CONFIG).write_text(text)
    assert refusal(fused).startswith(f"{fused / CONFIG} {fault}")


PLAIN = "only plain LoRA is read"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3', wanted is 'LORA'"),
        ({"peft_type": None}, "has peft_type None, wanted is 'LORA'"),
        ({"use_dora": True}, f"sets use_dora to True, wanted is False: {PLAIN}"),
        ({"use_rslora": True}, f"sets use_rslora to True, wanted is False: {PLAIN}"),
        ({"lora_bias": True}, f"sets lora_bias to True, wanted is False: {PLAIN}"),
        ({"bias": "all"}, f"sets bias to 'all', wanted is 'none': {PLAIN}"),
        (
            {"modules_to_save": ["lm_head"]},
            f"sets modules_to_save to ['lm_head'], wanted is None: {PLAIN}",
        ),
        (
            {"layer_replication": [[0, 2], [1, 2]]},
            f"sets layer_replication to [[0, 2], [1, 2]], wanted is None: {PLAIN}",
        ),
        (
            {"trainable_token_indices": [1]},
            f"sets trainable_token_indices to [1], wanted is None: {PLAIN}",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "sets init_lora_weights to 'pissa_niter_4', which changes the base weights too: save it"
            " as plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        ),
        ({"r": 0}, "has r 0, wanted is a whole number above 0"),
        ({"r": None}, "has r None, wanted is a whole number above 0"),
        ({"r": 4.0}, "has r 4.0, wanted is a whole number above 0"),
        ({"r": True}, "has r True, wanted is a whole number above 0"),
        ({"lora_alpha": "8"}, "has lora_alpha '8', wanted is a number above 0"),
        ({"lora_alpha": float("inf")}, "has lora_alpha inf, wanted is a number above 0"),
        ({"rank_pattern": [4]}, "has rank_pattern [4], wanted are names and numbers"),
        (
            {"alpha_pattern": {"q_proj": -1}},
            "has alpha_pattern of q_proj -1, wanted is a number above 0",
        ),
        (
            {"rank_pattern": {"q_(proj": 4}},
            "has rank_pattern of 'q_(proj', which is not a regular expression: missing ),"
            " unterminated subpattern at position 2",
        ),
        ({"base_model_name_or_path": 3}, "has base_model_name_or_path 3, wanted is a name"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_plain_lora(refusal, fused, changes, fault):
    edit_settings(fused, **changes)
    assert refusal(fused) == f"{fused / CONFIG} {fault}"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"bias": None, "modules_to_save": []},
        {"use_dora": None, "a_setting_of_another_library": True},
        {"target_modules": "all-linear"},
        {"lora_alpha": 8.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_without_effect_are_taken(fused, model, changes):
    edit_settings(fused, **changes)
    assert open_adapter(fused, model).settings.scaling == 2.0
