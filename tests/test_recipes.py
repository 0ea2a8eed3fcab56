"""The options files in examples/recipes: each fits as it says, and trains a tiny model of its kind.

What takes long, rehearsals and all runs but one, is left to `RECIPES=all pytest
tests/test_recipes.py`.
"""

import json
import os
import re
from pathlib import Path

import pytest

import train_accelerate_fsdp2
from megablocks_utils import plan
from megablocks_utils.processes.entry_point import run_entry_point
from tests.support.argv import keep_last
from tests.support.tiny_families import save_tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
IS_WHOLE = os.environ.get("RECIPES") == "all"
REHEARSED = ("gpt-oss", "qwen3.5")
RUN_IN_CI = "qwen3-30b-a3b-lora-8gpu"
FAMILIES = {
    "mixtral-8x7b": "mixtral",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-235b-a22b": "qwen3_moe",
    "gpt-oss-20b": "gpt_oss",
    "gpt-oss-120b": "gpt_oss",
    "qwen3.5-35b-a3b": "qwen3_5_moe",
}
WORDS = [{"input_ids": [5 + i % 90, 6, 7, 8], "labels": [-100, 6, 7, 8]} for i in range(8)]


def read_head(recipe):
    """Return the command of a plan, the number of GPUs and the planned peak that a recipe names."""
    text = recipe.read_text()
    (command,) = re.findall(r"^#   python -m megablocks_utils\.plan (.+)$", text, re.MULTILINE)
    gpus, peak = re.search(r"^# (\d+) x \S+: a peak of (\d+) GB", text, re.MULTILINE).groups()
    assert f"--nproc_per_node={gpus} train_accelerate_fsdp2.py --config {name_of(recipe)}\n" in text
    return command.split(), int(gpus), int(peak)


def name_of(recipe):
    return str(recipe.relative_to(ROOT))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_it_fits_as_it_says(recipe, tmp_path, monkeypatch, capsys):
    words, gpus, peak = read_head(recipe)
    assert words[words.index("--config") + 1] == name_of(recipe)
    assert words[words.index("--gpus") + 1] == str(gpus)
    if recipe.stem.startswith(REHEARSED) and not IS_WHOLE:
        pytest.skip("its plan is rehearsed, 10 to 20 s of CPU: RECIPES=all")
    monkeypatch.chdir(ROOT)
    run_entry_point(plan.main, [*words, "--json", str(tmp_path / "plan.json")])
    capsys.readouterr()
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert row["verdict"] == "fits"
    assert round(row["peak_bytes"] / 1e9) == peak


def _call_main(rank, argv):
    train_accelerate_fsdp2.main(keep_last(argv))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_it_trains_a_tiny_model_of_its_kind(recipe, ranks2, tmp_path):
    if recipe.stem != RUN_IN_CI and not IS_WHOLE:
        pytest.skip("one recipe is run in CI: RECIPES=all")
    family = next(family for model, family in FAMILIES.items() if recipe.stem.startswith(model))
    save_tiny(family, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(WORDS))
    changed = {
        "model_name_or_path": tmp_path / "model",
        "data_path": tmp_path / "data.json",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
    }
    if "use_megablocks_sharding: true" in recipe.read_text():
        changed["ep_size"] = 2
    argv = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    ranks2.run(_call_main, ["--config", str(recipe), *argv], timeout=240)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "out" / "adapter_config.json").is_file() == ("lora" in recipe.stem)
