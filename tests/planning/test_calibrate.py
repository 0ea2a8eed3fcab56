"""Two runs are made as asked, and their times give back what they were made with."""

import json
import shlex
from pathlib import Path

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.calibrate import calibrate
from megablocks_utils.planning.memory import scenario as scenario_module
from megablocks_utils.planning.speed.calibration import read_calibration
from tests.planning.cases import MIXTRAL, build_prediction

BYTES_PER_S, OVERHEAD_S, ACCUMULATION = 2e11, 0.25, 4
GATHERED, PER_TOKEN = 160_000_000_000, 1_000_000


def sent_in_a_step(layout, run):
    """Weights without expert parallelism, a twentieth of them and a little a token with it."""
    weights = GATHERED if layout.ep_size == 1 else GATHERED // 20
    tokens = 0 if layout.ep_size == 1 else PER_TOKEN * run.tokens
    return {"all_gather": weights * run.accumulation, "all_to_all": tokens * run.accumulation}


@pytest.fixture(autouse=True)
def known_traffic(monkeypatch):
    def predict(shape, layout, run):
        return build_prediction(parameters=1, sent=sent_in_a_step(layout, run))

    monkeypatch.setattr(scenario_module, "predict", predict)


class PlantedRuns:
    """Stand in for torchrun: write what a run leaves, with the times that its layout must take."""

    def __init__(self, *, world_size=4, tokens=300, code=0, slow_warmup=True, gpus=("A100",)):
        self.world_size, self.tokens, self.code = world_size, tokens, code
        self.slow_warmup, self.gpus = slow_warmup, list(gpus)
        self.commands, self.configs = [], []

    def __call__(self, command):
        self.commands.append(command)
        script = next(i for i, word in enumerate(command) if word.endswith("_fsdp2.py"))
        config = parse_args(command[script + 1 :], entry_point="fsdp2")
        self.configs.append(config)
        if self.code:
            return self.code
        folder = Path(config.output_dir)
        folder.mkdir()  # the second run must find a place without the first one's files
        (folder / "model.safetensors").write_text("large")
        has_ep = config.parallel.use_megablocks_sharding
        sent = GATHERED // 20 + PER_TOKEN * self.tokens if has_ep else GATHERED
        micro_step_s = OVERHEAD_S + sent / BYTES_PER_S
        lines = []
        for step in range(config.optim.max_steps):
            warm = 10 if step < 5 and self.slow_warmup else 1
            lines.append(
                {
                    "step": step + 1,
                    "loss": 1.0,
                    "step_time_s": warm * ACCUMULATION * micro_step_s,
                    "input_tokens": self.tokens * self.world_size * ACCUMULATION,
                }
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = {"command": shlex.join(command[-3:]), "commit": "c0ffee"}
        record |= {"versions": {"torch": "2"}, "hardware": {"gpus": self.gpus}}
        (folder / "run.json").write_text(json.dumps(record))
        return 0


def words(tmp_path, line=""):
    return [
        *(str(MIXTRAL), "--nproc", "4", "--output", str(tmp_path / "node.json")),
        *("--gradient_accumulation_steps", str(ACCUMULATION), *line.split()),
    ]


def test_both_numbers_come_back(tmp_path, capsys):
    runs = PlantedRuns()
    calibrate(words(tmp_path, "--steps 3"), run=runs)
    found = read_calibration(tmp_path / "node.json")
    assert found.bytes_per_s == pytest.approx(BYTES_PER_S)
    assert found.overhead_s == pytest.approx(OVERHEAD_S)
    record = json.loads((tmp_path / "node.json").read_text())
    assert [run["name"] for run in record["runs"]] == [
        "no expert parallelism",
        "ep_size 4, expert_dp shard",
    ]
    assert [len(run["micro_step_s"]) for run in record["runs"]] == [3, 3]
    assert record["provenance"]["runs"][0]["commit"] == "c0ffee"
    assert record["provenance"]["runs"][1]["command"] == shlex.join(runs.commands[1][-3:])
    shown = capsys.readouterr().out
    assert "200 GB/s a rank and 0.25 s a micro-step besides" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["node.json"]


def test_the_runs_are_the_users_but_for_the_layout(tmp_path):
    runs = PlantedRuns()
    line = "--use_lora all --ep_size 2 --output_dir mine --max_steps 1000 --save_strategy epoch"
    calibrate(words(tmp_path, f"{line} --warmup 6"), run=runs)
    without, with_ep = runs.configs
    assert not without.parallel.use_megablocks_sharding
    assert (with_ep.parallel.ep_size, with_ep.parallel.expert_dp) == (4, "shard")
    for config, command in zip(runs.configs, runs.commands, strict=True):
        assert (config.adapter.use_lora, config.saving.save_strategy) == ("all", "no")
        assert config.optim.max_steps == 6 + 10
        assert config.model.model_name_or_path == str(MIXTRAL.parent)
        assert Path(config.output_dir).parents[1] == tmp_path
        assert command[1:6] == (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
        )
        assert Path(command[6]).is_file()


def test_on_cpu_processes_the_precision_is_a_cpus(tmp_path):
    calibrate(words(tmp_path), run=PlantedRuns(gpus=()))
    assert read_calibration(tmp_path / "node.json").workload["compute_dtype"] == "float32"
    calibrate(words(tmp_path), run=PlantedRuns())
    assert read_calibration(tmp_path / "node.json").workload["compute_dtype"] == "bfloat16"


def refusal(argv, run):
    with pytest.raises(ConfigurationError) as caught:
        calibrate(argv, run=run)
    return str(caught.value)


def test_a_run_that_fails_ends_it(tmp_path):
    runs = PlantedRuns(code=2)
    assert refusal(words(tmp_path), runs) == (
        "the run with no expert parallelism ended with exit code 2, for the reason above; nothing "
        "was written."
    )
    assert len(runs.commands) == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_that_do_not_tell_the_bandwidth_leave_nothing(tmp_path):
    # 160 million tokens: what is sent for them is as much as the weights, and neither is faster.
    tokens = (GATHERED - GATHERED // 20) // PER_TOKEN
    told = refusal(words(tmp_path), PlantedRuns(tokens=tokens))
    assert "so the bandwidth cannot be told" in told
    assert list(tmp_path.iterdir()) == []


REFUSALS = {
    "m --output node.json": "--nproc is not given, but it must be a whole number of at least 2.",
    "m --nproc 4": "--output is not given, but it must be a file to write.",
    "--nproc 4 --output node.json": "MODEL is not given, but it must be a local folder or a "
    "Hub name.",
    "m --nproc 1 --output node.json": "--nproc is 1, but it must be a whole number of at least 2.",
    "m --nproc 4 --output tests": "--output is tests, but that is a folder; it must be a file in a "
    "folder that exists.",
    "m --nproc 4 --output node.json --step 3": "unknown option --step; did you mean --steps?",
    f"{MIXTRAL} --nproc 3 --output node.json": "--nproc is 3, but it must have a divisor above 1 "
    "that divides the 8 experts of this model too.",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line):
    runs = PlantedRuns()
    assert refusal(line.split(), runs) == REFUSALS[line]
    assert runs.commands == []


def test_an_installed_package_has_no_script_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr("megablocks_utils.planning.calibrate._SCRIPT", tmp_path / "train.py")
    runs = PlantedRuns()
    assert "train.py, which is not installed with the package" in refusal(words(tmp_path), runs)
    assert runs.commands == []


def test_help():
    with pytest.raises(HelpRequested) as caught:
        calibrate(["--help"])
    text = str(caught.value)
    assert "--nproc N" in text and max(map(len, text.splitlines())) <= 100
