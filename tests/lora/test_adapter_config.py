"""A configuration that says more than plain LoRA, or nothing, is refused in one sentence."""

import peft
import pytest

from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.lora.trainable import settings_of_adapter
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
        ({"lora_bias": True}, f"sets lora_bias to True, wanted is False: {PLAIN}"),
        ({"bias": "some"}, "has bias 'some', wanted is one of none, all, lora_only"),
        ({"use_qalora": True}, f"sets use_qalora to True, wanted is False: {PLAIN}"),
        (
            {"megatron_config": {"a": 1}},
            f"sets megatron_config to {{'a': 1}}, wanted is None: {PLAIN}",
        ),
        (
            {"alora_invocation_tokens": [1]},
            f"sets alora_invocation_tokens to [1], wanted is None: {PLAIN}",
        ),
        (
            {"a_setting_of_another_library": True},
            f"sets a_setting_of_another_library to True, a setting that PEFT {peft.__version__}"
            f" does not have (PEFT {peft.__version__} wrote the file)",
        ),
        ({"target_modules": 3}, "has target_modules 3, wanted is a list of texts"),
        ({"target_modules": [3]}, "has target_modules [3], wanted is a list of texts"),
        ({"target_parameters": "x"}, "has target_parameters 'x', wanted is a list of texts"),
        (
            {"layers_to_transform": ["0"]},
            "has layers_to_transform ['0'], wanted are numbers of layers",
        ),
        (
            {"layers_to_transform": [-1]},
            "has layers_to_transform [-1], wanted are numbers of layers",
        ),
        ({"use_rslora": "x"}, "has use_rslora 'x', wanted is true or false"),
        ({"peft_version": 3}, "has peft_version 3, wanted is a text"),
        ({"r": 10**9}, "has r 1000000000, wanted is 1,000,000 at most"),
        ({"r": 10**30}, f"has r {10**30}, wanted is a whole number of 1 or more"),
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
        (
            {"init_lora_weights": 3},
            "sets init_lora_weights to 3, wanted is true, false or one of gaussian, eva,"
            " orthogonal, mica",
        ),
        ({"r": 0}, "has r 0, wanted is a whole number of 1 or more"),
        ({"r": None}, "has r None, wanted is a whole number of 1 or more"),
        ({"r": 4.0}, "has r 4.0, wanted is a whole number of 1 or more"),
        ({"r": True}, "has r True, wanted is a whole number of 1 or more"),
        ({"lora_alpha": "8"}, "has lora_alpha '8', wanted is a number from 0 to 1e+300"),
        ({"lora_alpha": 0}, "has lora_alpha 0, wanted is a number above 0"),
        ({"lora_alpha": float("inf")}, "is not valid JSON: Infinity is no number of JSON"),
        ({"rank_pattern": [4]}, "has rank_pattern [4], wanted is an object"),
        (
            {"alpha_pattern": {"q_proj": -1}},
            "has alpha_pattern q_proj -1, wanted is a number from 0 to 1e+300",
        ),
        (
            {"rank_pattern": {"q_(proj": 4}},
            "has rank_pattern 'q_(proj', which is not a regular expression: missing ),"
            " unterminated subpattern at position 2",
        ),
        ({"base_model_name_or_path": 3}, "has base_model_name_or_path 3, wanted is a text"),
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
        {"use_dora": None, "a_setting_of_another_library": False},
        {"bias": "all"},
        {"target_modules": ["k_proj", "q_proj", "o_proj"]},
        {"target_modules": r".*self_attn\.[kq]_proj"},
        {"lora_alpha": 8.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_without_effect_are_taken(fused, model, changes):
    edit_settings(fused, **changes)
    assert settings_of_adapter(open_adapter(fused, model), model).scaling == 2.0
