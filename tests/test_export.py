"""A checkpoint becomes a model that transformers loads, without the processes of its run."""

import functools
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megablocks_utils import export
from megablocks_utils.checkpoint import stored_model
from megablocks_utils.checkpoint.distributed_checkpoint import MODEL_PREFIX
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.export import ExportOptions, export_checkpoint, main, parse_options
from megablocks_utils.lora.trained_format import read_trained_format
from tests.support.parity import Layout, ParityFolder
from tests.support.resuming import SAVED_STEP, SavedRun, make_run, run_and_save

NUM_STEPS = SAVED_STEP + 1  # what is exported is not the last state


@pytest.fixture(scope="module")
def save(ranks2, tmp_path_factory):
    """Train on two ranks; the run with its state after step 3."""
    models = ParityFolder(tmp_path_factory.mktemp("models"))

    @functools.cache
    def run(script: str, **case) -> SavedRun:
        layout = Layout(2, 2, "shard" if script == "fsdp2" else "replicate")
        folder = tmp_path_factory.mktemp("run")
        run = make_run(script, layout, num_steps=NUM_STEPS, **case)
        return run_and_save({2: ranks2}, models, run, folder)

    return run


@pytest.fixture(scope="module")
def mixtral(save) -> SavedRun:
    return save("fsdp2", model="mixtral", precision="fp32")


def refusal(action, *args) -> str:
    with pytest.raises((CheckpointError, ConfigurationError)) as error:
        action(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("script", "model"), [("fsdp2", "qwen3_moe, tied"), ("fsdp1", "olmoe"), ("fsdp2", "mixtral")]
)
def test_transformers_loads_the_state_of_the_step(save, tmp_path, script, model):
    saved = save(script, model=model, precision="bf16" if model == "olmoe" else "fp32")
    line = export_checkpoint(ExportOptions(tmp_path / "out", saved.checkpoint))
    assert line == f"wrote {tmp_path / 'out'}: the model after step 3"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = dict(loaded.named_parameters())
    assert {MODEL_PREFIX + name for name in weights} == {
        name for name in saved.state if name.startswith(MODEL_PREFIX)
    }
    for name, weight in weights.items():
        wanted = saved.state[MODEL_PREFIX + name]
        assert weight.dtype == wanted.dtype and torch.equal(weight, wanted), name


def test_an_adapter_is_what_was_trained(save, tmp_path):
    saved = save("fsdp2", lora="experts,attention,router", quantization="nf4")
    line = export_checkpoint(ExportOptions(tmp_path / "out", saved.checkpoint))
    assert line.endswith("the adapter after step 3")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trained = [name for name in saved.state if name.startswith(MODEL_PREFIX)]
    wanted = dict(_in_peft_form(name, saved.state[name]) for name in trained)
    assert written.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(written[key], tensor), key
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert {"gate.weight", "mlp.experts.down_proj"} <= set(config.target_parameters)
    assert read_trained_format(tmp_path / "out") == "nf4"


def _in_peft_form(name, tensor):
    """Return a stored adapter by the name and in the form of PEFT's files, written out."""
    name = name.removeprefix(MODEL_PREFIX)
    if "_proj_lora." not in name:
        return f"base_model.model.{name.replace('.default.', '.')}", tensor
    module, projection, side = re.fullmatch(r"(.+)\.(\w+)_lora\.(lora_[AB])", name).groups()
    wrapper = ".base_layer" if projection == "gate_up_proj" else ""
    packed = tensor.flatten(0, 1) if side == "lora_A" else tensor.permute(1, 2, 0).flatten(1)
    return f"base_model.model.{module}{wrapper}.{side}.weight", packed


def test_one_tensor_is_held_at_a_time(mixtral, tmp_path, monkeypatch):
    """Each is let go before the next is read: of experts, one projection of one layer."""
    read, held = stored_model.read_whole_tensor, []

    def watch(*args):
        assert all(reference() is None for reference in held)
        tensor = read(*args)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(stored_model, "read_whole_tensor", watch)
    export_checkpoint(ExportOptions(tmp_path / "out", mixtral.checkpoint))
    assert len(held) == sum(name.startswith(MODEL_PREFIX) for name in mixtral.state)


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(mixtral, tmp_path):
    damaged = shutil.copytree(mixtral.checkpoint, tmp_path / "checkpoint-3")
    file = damaged / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    options = ExportOptions(tmp_path / "new" / "out", damaged)
    assert refusal(export_checkpoint, options).startswith(f"{file} was altered: its checksum is ")
    assert not (tmp_path / "new").exists()


def test_what_is_no_checkpoint(mixtral, tmp_path):
    assert refusal(export_checkpoint, ExportOptions(tmp_path / "out", tmp_path / "none")) == (
        f"--checkpoint is {tmp_path / 'none'}, but that is no folder; it must be a checkpoint of a "
        "run."
    )
    newest = mixtral.folder / f"checkpoint-{NUM_STEPS}"
    assert refusal(export_checkpoint, ExportOptions(tmp_path / "out", mixtral.folder)) == (
        f"--checkpoint is {mixtral.folder}, but that holds no manifest.json; it must be a complete "
        f"checkpoint, such as {newest}."
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert refusal(export_checkpoint, ExportOptions(tmp_path / "out", newest)).startswith(
        f"--output is {tmp_path / 'out'}, but it holds x; "
    )


def test_options():
    with pytest.raises(HelpRequested):
        main(["--help"])
    assert refusal(parse_options, ["--chekpoint", "a"]) == (
        "unknown option --chekpoint; did you mean --checkpoint?"
    )
    assert refusal(parse_options, ["--checkpoint", "a"]).startswith("--output is not given")
    assert export.COMMAND.names == (
        *("output", "checkpoint", "adapter", "adapter_layout", "model_name_or_path"),
        *("save_dtype", "config"),
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--checkpoint or --adapter must be given, but neither is."),
        ("--checkpoint a --adapter b", "--checkpoint or --adapter must be given, but both are."),
        ("--adapter b", "--adapter_layout is not given, but --adapter is; it must be per-expert."),
        (
            "--checkpoint a --adapter_layout per-expert",
            "--adapter_layout is per-expert, but --checkpoint takes no such option.",
        ),
        (
            "--adapter b --adapter_layout per-expert --save_dtype float16",
            "--save_dtype is float16, but --adapter takes no such option.",
        ),
    ],
)
def test_options_that_do_not_go_together(words, sentence):
    assert refusal(parse_options, ["--output", "out", *words.split()]) == sentence


def test_help_needs_no_torch():
    code = (
        "import sys; from megablocks_utils import export\n"
        "try:\n    export.main(['--checkpoint', 'x', '--output', 'y'])\n"
        "except Exception: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
