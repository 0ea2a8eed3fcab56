"""A checkpoint that is damaged, or of another run, is refused in one sentence on every rank."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megablocks_utils.checkpoint.distributed_checkpoint import (
    read_stored_tensors,
    read_whole_tensor,
    write_shards,
)
from megablocks_utils.checkpoint.manifest import describe_file, write_manifest
from megablocks_utils.checkpoint.tensor_shards import BlockPlace
from megablocks_utils.errors import CheckpointError, ConfigurationError
from tests.support.parity import Layout, build_run
from tests.support.resuming import EPOCH_BOUNDARY, SAVED_STEP, make_run, run_and_save

RUN = make_run("fsdp2", Layout(2, 2), num_steps=SAVED_STEP, lora="attn-only", lora_rank=4)


@pytest.fixture(scope="module")
def checkpoint(pools, parity_folder, tmp_path_factory) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("refusals") / "run"
    return run_and_save(pools, parity_folder, RUN, folder).checkpoint


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def refuse(pools, parity_folder, tmp_path):
    """Try to resume; return the error, which is the same on all ranks, and its sentence."""

    def try_to_resume(checkpoint: Path, *words: str, run=RUN) -> tuple[str, str]:
        argv = [*parity_folder.argv(run.case), *words]
        argv += ["--output_dir", f"{tmp_path}/out", "--resume_from_checkpoint", f"{checkpoint}"]
        answers = pools[run.layout.world_size].run(_meet_error, argv)
        assert answers == answers[:1] * len(answers)
        assert "\n" not in answers[0][1]
        assert not (tmp_path / "out").exists()
        return answers[0]

    return try_to_resume


def _meet_error(rank: int, argv: list[str]) -> tuple[str, str]:
    try:
        build_run(argv)
    except (CheckpointError, ConfigurationError) as error:
        return type(error).__name__, error.as_options()
    return "none", "it was resumed"


OTHER_RUNS = {
    "global batch": (
        {"accumulation": 2},
        ["--per_device_train_batch_size", "6"],
        "2 processes x --per_device_train_batch_size 6 x --gradient_accumulation_steps 2 give "
        "steps of 24 examples, but the checkpoint to resume from has steps of 16; with 2 processes "
        "their product must be 8, for example --per_device_train_batch_size 8 "
        "and --gradient_accumulation_steps 1.",
    ),
    "ranks": (
        {"layout": Layout(4, 2)},
        ["--per_device_train_batch_size", "8"],
        "4 processes x --per_device_train_batch_size 8 x --gradient_accumulation_steps 1 give "
        "steps of 32 examples, but the checkpoint to resume from has steps of 16; with 4 processes "
        "their product must be 4, for example --per_device_train_batch_size 4 "
        "and --gradient_accumulation_steps 1.",
    ),
    "seed": ({}, ["--seed", "4"], "--seed is 4, but the checkpoint to resume from has 3."),
    "number of examples": (
        {"num_examples": EPOCH_BOUNDARY},
        [],
        "the number of examples in --data_path is 37, but the checkpoint to resume from has 53.",
    ),
    "LoRA rank": (
        {"lora_rank": 8},
        [],
        "--use_lora, --lora_r and --lora_alpha give the adapters r 8, alpha 8, "
        "target_modules k_proj o_proj q_proj v_proj, expert_ranks none, but the checkpoint to "
        "resume from has r 4, alpha 8, target_modules k_proj o_proj q_proj v_proj, "
        "expert_ranks none.",
    ),
    "precision": (
        {"precision": "bf16"},
        [],
        "--precision gives the dtypes weights bfloat16, optim bfloat16, but the checkpoint to "
        "resume from has weights float32, optim float32.",
    ),
    "steps": (
        {"num_steps": 2},
        [],
        "--max_steps or --num_train_epochs give 2 steps, but the checkpoint to resume from has "
        "done 3.",
    ),
}


@pytest.mark.parametrize(("case", "words", "sentence"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_is_refused(refuse, checkpoint, case, words, sentence):
    run = replace(RUN, case=replace(RUN.case, **case))
    assert refuse(checkpoint, *words, run=run) == ("ConfigurationError", sentence)


def test_other_tokens_are_refused(refuse, checkpoint, parity_folder, tmp_path):
    argv = parity_folder.argv(RUN.case)
    examples = json.loads(Path(argv[argv.index("--data_path") + 1]).read_text())
    examples[-1]["input_ids"][0] ^= 1
    (tmp_path / "data.json").write_text(json.dumps(examples))
    kind, sentence = refuse(checkpoint, "--data_path", f"{tmp_path}/data.json")
    assert kind == "ConfigurationError"
    assert sentence.startswith("--data_path or --max_seq_length has changed: the checksum of its")


def test_another_base_of_the_same_shape_is_refused(refuse, checkpoint, parity_folder, tmp_path):
    argv = parity_folder.argv(RUN.case)
    other = shutil.copytree(argv[argv.index("--model_name_or_path") + 1], tmp_path / "other")
    for path in other.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    kind, sentence = refuse(checkpoint, "--model_name_or_path", f"{other}")
    assert kind == "ConfigurationError"
    assert sentence.startswith("--model_name_or_path is not the model that the adapters were trai")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _say_another_step(path: Path) -> None:
    path.write_text(path.read_text().replace(f'"step": {SAVED_STEP}', '"step": 2'))


DAMAGES = [
    ("__1_0.distcp", _truncate, "__1_0.distcp is truncated: it has "),
    ("__0_0.distcp", _flip_one_bit, "__0_0.distcp was altered: its checksum is "),
    ("__1_0.distcp", _flip_one_bit, "__1_0.distcp was altered: its checksum is "),
    ("__0_0.distcp", Path.unlink, "lacks its file __0_0.distcp"),
    (".metadata", _flip_one_bit, ".metadata was altered: its checksum is "),
    ("rng-00001.json", Path.unlink, "lacks its file rng-00001.json"),
    ("metrics.jsonl", _flip_one_bit, "metrics.jsonl was altered: its checksum is "),
    ("manifest.json", _say_another_step, "manifest.json was altered: its content does not have"),
    ("manifest.json", _truncate, "manifest.json is not valid JSON"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_damaged_checkpoint_is_refused(refuse, copy, name, damage, words):
    damage(copy / name)
    kind, sentence = refuse(copy)
    assert kind == "CheckpointError"
    assert words in sentence
    assert str(copy) in sentence


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint, and its manifest with them."""
    tensors = {
        name: read_whole_tensor(name, *stored, folder)
        for name, stored in read_stored_tensors(folder).items()
    }
    change(tensors)
    for path in [*folder.glob("*.distcp"), folder / ".metadata"]:
        path.unlink()
    shards = {name: BlockPlace(t.shape, (0,) * t.dim()).shard(t) for name, t in tensors.items()}
    write_shards(shards, folder, None)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    contents = {k: v for k, v in manifest.items() if k not in ("format", "files", "sha256")}
    write_manifest(folder, contents, {name: describe_file(folder / name) for name in names})


Q_PROJ = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
CHANGES = [
    (lambda tensors: tensors.pop(f"model.{Q_PROJ}"), f"lacks {Q_PROJ} (1 of the parameters"),
    (lambda tensors: tensors.pop(f"optimizer.{Q_PROJ}.exp_avg"), f"lacks optimizer.{Q_PROJ}.exp"),
    (
        lambda tensors: tensors.update({f"optimizer.{Q_PROJ}.max_exp_avg_sq": torch.zeros(1)}),
        f"also holds optimizer.{Q_PROJ}.max_exp_avg_sq (1 of the optimizer's states)",
    ),
    (
        lambda tensors: tensors.update({"ema.x": torch.zeros(1)}),
        "also holds ema.x (1 of the optimizer's",
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_nothing_in_a_checkpoint_is_left_unread(refuse, copy, change, words):
    _rewrite(copy, change)
    assert words in refuse(copy)[1]


def test_checkpoint_without_a_manifest_is_not_complete(refuse, copy):
    (copy / "manifest.json").unlink()
    kind, sentence = refuse(copy)
    assert kind == "ConfigurationError"
    assert sentence.startswith(
        f"--resume_from_checkpoint is {copy}, but that holds no manifest.json"
    )
