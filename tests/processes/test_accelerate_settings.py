"""What Accelerate's launcher exports, made by the launcher itself: honoured or refused by name."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.accelerate_settings import (
    check_accelerate_settings,
    check_layer_classes,
)

SHIPPED = yaml.safe_load((Path(__file__).parents[2] / "accelerate.yaml").read_text())
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}


def launch(tmp_path, monkeypatch, settings, words=()):
    """Return the environment that `accelerate launch` gives the script."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(settings | {"main_process_port": 0}))
    line = ["--config_file", str(path), "--num_processes", "2", *words, "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    return prepare_multi_gpu_env(args)


def refusal(environ, entry_point="fsdp1", line=""):
    config, _ = parse_known_args(line.split(), entry_point=entry_point)
    with pytest.raises(ConfigurationError) as error:
        check_accelerate_settings(config, environ)
    return str(error.value)


def test_the_shipped_configuration_is_taken(tmp_path, monkeypatch):
    environ = launch(tmp_path, monkeypatch, SHIPPED)
    check_accelerate_settings(parse_known_args([], entry_point="fsdp1")[0], environ)
    assert "fsdp_version is 1" in refusal(environ, "fsdp2")


def test_what_the_fsdp2_script_takes(tmp_path, monkeypatch):
    environ = launch(tmp_path, monkeypatch, SHIPPED | {"fsdp_config": FSDP2})
    check_accelerate_settings(parse_args([], entry_point="fsdp2"), environ)
    assert "fsdp_version is 2" in refusal(environ, "fsdp1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mixed_precision": "bf16"}, "mixed_precision is bf16 .* must be no, since"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_backend is INDUCTOR"),
        ({"fsdp_offload_params": True}, "fsdp_offload_params is true .* must be false, since"),
        ({"fsdp_sharding_strategy": "NO_SHARD"}, "fsdp_sharding_strategy is NO_SHARD"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy is SIZE_BASED"),
        ({"fsdp_use_orig_params": False}, "fsdp_use_orig_params is false"),
        ({"fsdp_ignored_modules": ".*mlp.*"}, "fsdp_ignored_modules is .* must not be set"),
        ({"fsdp_state_dict_type": "LOCAL_STATE_DICT"}, "fsdp_state_dict_type is LOCAL"),
        (
            {"parallelism_config": {"parallelism_config_tp_size": 2}},
            "parallelism_config_tp_size is 2",
        ),
        ({"parallelism_config": {"parallelism_config_dp_shard_size": 2}}, "use_parallelism_config"),
    ],
)
def test_what_is_refused(changes, named, tmp_path, monkeypatch):
    of_fsdp = {name: value for name, value in changes.items() if name.startswith("fsdp_")}
    others = {name: value for name, value in changes.items() if name not in of_fsdp}
    settings = SHIPPED | {"fsdp_config": SHIPPED["fsdp_config"] | of_fsdp} | others
    environ = launch(tmp_path, monkeypatch, settings)
    message = refusal(environ)
    assert re.match(named, message), message


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "use_deepspeed is true"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm is true"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, "ACCELERATE_TORCH_DEVICE is meta"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps is 4 .* 1;"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping is 0.5 .* --max_grad_norm is"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4"),
        # Read by Accelerate's plugin also where nobody asks for FSDP.
        ({"FSDP_SHARDING_STRATEGY": "9"}, "fsdp_sharding_strategy is 9"),
        ({"ACCELERATE_MIXED_PRECISION": ""}, "mixed_precision is empty"),
        ({"ACCELERATE_USE_CPU": "x"}, "use_cpu is x"),
        ({"FSDP_STATE_DICT_TYPE": "x"}, "fsdp_state_dict_type is x"),
    ],
)
def test_what_is_refused_wherever_it_comes_from(environ, named):
    assert re.match(named, refusal(environ, "fsdp2"))


def test_what_an_option_says_too_may_be_the_same():
    environ = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
    }
    line = "--gradient_accumulation_steps 4"
    check_accelerate_settings(parse_args(line.split(), entry_point="fsdp2"), environ)
    line += " --gradient_checkpointing False"
    assert "--gradient_checkpointing is False" in refusal(environ, "fsdp2", line)


def test_the_cpu_is_used_where_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "cpu.yaml"
    settings = {"distributed_type": "NO", "use_cpu": True, "mixed_precision": "no"}
    path.write_text(yaml.safe_dump(settings | {"num_processes": 1, "num_machines": 1}))
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, _, _ = _validate_launch_command(parsed)
    environ = prepare_simple_launcher_cmd_env(args)[1]
    check_accelerate_settings(parse_args([], entry_point="fsdp2"), environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


def test_other_units_than_the_decoder_layers_are_refused():
    environ = {"ACCELERATE_USE_FSDP": "true", "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B"}
    check_layer_classes(["B", "A"], environ)
    with pytest.raises(ConfigurationError, match="must be C or not be set"):
        check_layer_classes(["C"], environ)
