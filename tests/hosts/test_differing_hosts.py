"""Two hosts that are not given the same: both end before the first step, and each says why.

Plain processes that take themselves for hosts; `two_hosts.sh` has hosts with networks of their own.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.ranks import ScriptRun
from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

END_S = 60.0
LEFT_OUT = ("frame #", "Exception raised", "[W", "[E")  # torch's own words


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, the same with other weights, data, and the same in another order."""
    folder = tmp_path_factory.mktemp("hosts")
    save_tiny_model("mixtral", folder / "model", sharded=False)
    shutil.copytree(folder / "model", folder / "other-model")
    (weights,) = (folder / "other-model").glob("*.safetensors")
    changed = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    write_examples(folder / "data.json", 9)
    examples = json.loads((folder / "data.json").read_text())
    (folder / "other.json").write_text(json.dumps(examples[::-1]))
    shutil.copy(folder / "data.json", folder / "same.json")
    return folder


def run(folder: Path, script: str, own_words: dict[int, list[str]]) -> tuple[list[int], list[str]]:
    """Run two hosts to their end; return exit codes and what each has said."""
    words = "--use_megablocks_sharding True --max_steps 1 --per_device_train_batch_size 2"
    paths = {"model_name_or_path": "model", "data_path": "data.json", "output_dir": "out"}
    argv = words.split() + [
        word for name, path in paths.items() for word in (f"--{name}", str(folder / path))
    ]
    shutil.rmtree(folder / "out", ignore_errors=True)
    run = ScriptRun(
        script, argv, folder / "logs", world_size=2, own_words=own_words, are_hosts=True
    )
    with run:
        codes = run.wait(END_S)
        outputs = run.outputs()
    said = [[x for x in text.splitlines() if x and not x.startswith(LEFT_OUT)] for text in outputs]
    return codes, ["\n".join(lines) for lines in said]


DIFFERENCES = [
    ("fsdp2", ["--gradient_accumulation_steps", "2"], "has --gradient_accumulation_steps 2, but"),
    ("fsdp1", ["--run_name", "x"], "has --run_name x, but rank 0 on"),
    ("fsdp2", ["--data_path", "{folder}/other.json"], "the data of --data_path on rank 1 on"),
    ("fsdp1", ["--model_name_or_path", "{folder}/other-model"], "the model of --model_name_or_p"),
]


@pytest.mark.parametrize(("script", "words", "sentence"), DIFFERENCES)
def test_hosts_that_differ_are_refused(folder, script, words, sentence):
    own = {1: [word.format(folder=folder) for word in words]}
    codes, said = run(folder, script, own)
    assert codes == [2, 2], said
    assert said[0] == said[1] and "\n" not in said[0], said
    assert sentence in said[0] and "rank 1 on " in said[0] and "rank 0 on " in said[0]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("refused", "other"), [(0, 1), (1, 0)])
def test_a_refusal_on_one_host_ends_the_other(folder, refused, other):
    codes, said = run(folder, "fsdp2", {refused: ["--learning_rat", "1"]})
    assert codes == [2, 2], said
    assert said[refused] == "unknown option --learning_rat; did you mean --learning_rate?"
    assert said[other].startswith(f"rank {refused} (process ")
    assert said[other].endswith(f" ended before the run began: {said[refused]}")


def test_the_same_in_another_place_is_the_same(folder):
    codes, said = run(folder, "fsdp2", {1: ["--data_path", str(folder / "same.json")]})
    assert codes == [0, 0], said
