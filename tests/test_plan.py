"""The command as it is typed: exit codes, files, one sentence for what cannot be planned."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest

from megablocks_utils import plan
from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import write_json_atomically
from megablocks_utils.planning.model.prediction import COLLECTIVES, COMPONENTS
from megablocks_utils.planning.speed.calibration import (
    TimedRun,
    build_record,
    describe_workload,
    solve,
)
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.training.report.expert_load import describe_layer
from tests.planning.cases import MIXTRAL, MODELS, PUBLISHED, build_scenario
from tests.planning.report.test_prediction_check import PLAN

CONTRACT = f"--gpus 8 --gpu a100-80g --use_lora none {PUBLISHED}"
"""The line of the contract, after MODEL."""


def contract(more):
    """Return the contract's line with some of its options replaced by others."""
    names = set(re.findall(r"--(\w+)", more))
    kept = [
        option
        for option in re.findall(r"--\w+ \S+", CONTRACT)
        if option[2:].split()[0] not in names
    ]
    return " ".join([*kept, more])


def run(line, capsys, model=MIXTRAL.parent):
    """Return exit code, standard output and standard error."""
    try:
        run_entry_point(plan.main, [*([str(model)] if model else []), *line.split()])
        code = 0
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_contracts_line_and_file(tmp_path, capsys):
    code, out, err = run(contract(f"--json {tmp_path / 'plan.json'}"), capsys)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["model"] == str(MIXTRAL.parent)
    assert found["options"]["gpu"] == "a100-80g"
    assert found["options"]["training"]["data"]["max_seq_length"] == 256
    assert all(isinstance(line, str) and line.endswith(".") for line in found["assumptions"])
    rows = {(row["ep_size"], row["expert_dp"]): row for row in found["rows"]}
    assert list(rows) == [
        (1, "shard"),
        *((2, "shard"), (2, "replicate"), (4, "shard"), (4, "replicate"), (8, "shard")),
    ]
    for row in rows.values():
        assert list(row["components"]) == list(COMPONENTS)
        assert list(row["sent_bytes_per_micro_step"]) == list(COLLECTIVES)
        numbers = [*row["components"].values(), *row["sent_bytes_per_micro_step"].values()]
        assert all(type(n) is int for n in [*numbers, row["peak_bytes"], row["allocated_bytes"]])
        assert sum(row["components"].values()) == row["peak_bytes"]
        needed = row["peak_bytes"] + 1_500_000_000
        assert (row["verdict"] == "oom") == (needed > found["capacity_bytes"])
        assert (row["rank"] is None) == (row["verdict"] == "oom")
    assert rows[4, "replicate"]["verdict"] == "oom"
    assert rows[4, "replicate"]["remedies"][0].startswith("--expert_dp shard: ")
    ranks = sorted(row["rank"] for row in rows.values() if row["rank"])
    assert ranks == list(range(1, len(ranks) + 1))
    assert found["chosen"] == next(row for row in found["rows"] if row["rank"] == 1)
    assert "torchrun --standalone" in out


def test_the_published_rows_are_ranked_right(tmp_path, capsys):
    """871 s with ep 8, 878 with ep 4 and adapters, 3037 and 2137 without (published table)."""
    for method, fast in (("none", [(8, "shard")]), ("attn-only", [(8, "shard"), (4, "replicate")])):
        for length in (210, 256):
            line = contract(f"--use_lora {method} --max_seq_length {length}")
            run(f"{line} --json {tmp_path / 'p.json'}", capsys)
            rows = json.loads((tmp_path / "p.json").read_text())["rows"]
            by_layout = {(row["ep_size"], row["expert_dp"]): row for row in rows}
            slowest = by_layout[1, "shard"]
            assert slowest["regime"] == "all-gather bound"
            for layout in fast:
                assert by_layout[layout]["rank"] < slowest["rank"]
                assert by_layout[layout]["regime"] == "launch bound"


def test_a_model_that_fits_nowhere_ends_with_3(tmp_path, capsys):
    path = tmp_path / "plan.json"
    code, out, err = run(contract(f"--gpu_mem_gib 5 --json {path}"), capsys)
    assert (code, err) == (3, "")
    assert "No row fits" in out and "OOM" in out
    found = json.loads(path.read_text())
    assert found["chosen"] is None
    assert {row["rank"] for row in found["rows"]} == {None}
    assert found["capacity_bytes"] == 5 * 1024**3


def test_a_bare_config(tmp_path, capsys):
    config = MODELS / "deepseek-v3" / "config.json"
    path = tmp_path / "plan.json"
    line = f"--gpus 512 --ep_size 8 --gpu h100-80g --per_device_train_batch_size 1 --json {path}"
    code, out, err = run(line, capsys, model=config)
    assert (code, err) == (0, "")
    found = json.loads(path.read_text())
    assert all("--ep_size 8" in row["launch"] for row in found["rows"])


@pytest.mark.parametrize("entry_point", ["fsdp2", "fsdp1"])
def test_every_rows_command_is_that_row(entry_point, tmp_path, capsys):
    path = tmp_path / "plan.json"
    line = contract(f"--entry_point {entry_point} --ep_size 4 --seed 7 --json {path}")
    assert run(line, capsys)[0] in (0, 3)
    (*_, row) = json.loads(path.read_text())["rows"]
    words = re.split(r"train_\w+\.py ", row["launch"])[1].split()
    parse = {"fsdp2": parse_args, "fsdp1": parse_known_args}[entry_point]
    config = parse(words, entry_point=entry_point)
    config = config[0] if entry_point == "fsdp1" else config
    assert config.parallel.ep_size == row["ep_size"] == 4
    assert config.parallel.expert_dp == row["expert_dp"] == "replicate"
    assert (config.seed, config.optim.gradient_accumulation_steps) == (7, 16)
    assert config.model.model_name_or_path == str(MIXTRAL.parent)


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_a_part_of_a_node(gpus, tmp_path, capsys):
    path = tmp_path / "plan.json"
    line = contract(f"--gpus {gpus} --json {path}")
    assert run(line, capsys)[0] in (0, 3)
    rows = json.loads(path.read_text())["rows"]
    assert [row["ep_size"] for row in rows] == [size for size in (1, 2) if gpus % size == 0]
    assert all(f"--nproc_per_node={gpus} " in row["launch"] for row in rows)


def test_the_imbalance_is_that_of_the_busiest_rank(tmp_path, capsys):
    """Without it, nothing but what the experts' rows take is less."""
    path, found = tmp_path / "plan.json", {}
    for imbalance in ("1", "2"):
        line = contract(f"--ep_size 8 --max_seq_length 4096 --imbalance {imbalance}")
        run(f"{line} --json {path}", capsys)
        found[imbalance] = json.loads(path.read_text())["rows"][0]
    assert found["2"]["peak_bytes"] > found["1"]["peak_bytes"]
    for name in ("parameters", "gradients", "optimizer"):
        assert found["2"]["components"][name] == found["1"]["components"][name]


REFUSALS = {
    "--gpu a100-80g --gpus 12": "--gpus is 12, but with 8 GPUs a node (--gpus_per_node) it must be "
    "at most 8 or a multiple of it.",
    "--gpu a100-80g --ep_size 3": "--ep_size is 3, but it must divide the 8 processes of this run; "
    "1, 2, 4 and 8 would work.",
    "--gpu a100-80g --gpus 16 --ep_size 16": "--ep_size is 16, but it must divide the 8 experts of "
    "this model; 1, 2, 4 and 8 would work.",
    "--gpu a100-80g --gpus 8..16 --ep_size 3": "--ep_size is 3, but it divides none of these "
    "numbers of GPUs and the 8 experts of this model.",
    "--gpu a100-80g --calibration none.json": "--calibration is none.json, but it cannot be read "
    "(No such file or directory); it must be a file that python -m megablocks_utils.plan calibrate "
    "has written.",
    "--gpu a100-80g --calibration none.json --gpus 8..16": "--calibration is none.json, but "
    "seconds are given for the GPUs that were measured only: --gpus must be one number.",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line, capsys):
    assert run(line, capsys) == (2, "", f"{REFUSALS[line]}\n")


def test_a_model_that_is_not_known(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, out, err = run(CONTRACT, capsys, model=tmp_path)
    assert (code, out) == (2, "")
    assert "llama" in err and err.count("\n") == 1


def test_seconds_for_the_measured_workload(tmp_path, capsys):
    """Half a second a micro-step and 100 GB/s, as two runs would tell it."""
    times = [TimedRun("a", 200e9, [2.5, 2.5]), TimedRun("b", 100e9, [1.5, 1.5])]
    calibration = solve(*times, describe_workload(build_scenario()))
    assert (calibration.overhead_s, calibration.bytes_per_s) == (0.5, 1e11)
    node, path = tmp_path / "node.json", tmp_path / "plan.json"
    write_json_atomically(node, build_record(calibration, times, {}))
    run(contract(f"--calibration {node} --json {path}"), capsys)
    for row in json.loads(path.read_text())["rows"]:
        sent = sum(row["sent_bytes_per_step"].values())
        assert row["step_s_estimate"] == pytest.approx(16 * 0.5 + sent / 1e11)
    code, _, err = run(contract(f"--calibration {node} --max_seq_length 512"), capsys)
    assert code == 2
    assert err.startswith(f"--calibration is {node}, but it was measured with max_seq_length 256 ")


def test_check(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"plan": PLAN}))
    code, out, err = run(f"--check {path}", capsys, model=None)
    assert (code, err) == (0, "")
    assert re.search(r"peak +48\.1 GB +50\.0 GB +-3\.8 %", out)
    path.write_text("{}")
    code, out, err = run(f"--check {path}", capsys, model=None)
    assert (code, out) == (2, "")
    assert err.startswith(f"--check is {path}, but it holds no plan; ")


def test_many_numbers_of_gpus(tmp_path, capsys):
    files = f"--json {tmp_path / 'p.json'} --plot {tmp_path / 'p.png'}"
    code, out, err = run(contract(f"--gpus 8..64 {files}"), capsys)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "p.json").read_text())
    assert [world["gpus"] for world in found["worlds"]] == [8, 16, 32, 64]
    assert found["dominance"] in " ".join(out.split())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    code, *_ = run(contract("--gpus 8..16 --gpu_mem_gib 3"), capsys)
    assert code == 3


@pytest.mark.parametrize("entry_point", ["fsdp2", "fsdp1"])
def test_printed_options_start_the_same_run(entry_point, tmp_path, capsys):
    line = "--ep_size 2 --learning_rate 1e-5 --report_to tensorboard --shuffle False"
    more = " --adam_beta1 0.9" if entry_point == "fsdp1" else ""
    code, out, err = run(f"{line}{more} --entry_point {entry_point} --print_config", capsys)
    assert (code, err) == (0, "")
    path = tmp_path / "run.yaml"
    path.write_text(out)
    words = ["--model_name_or_path", str(MIXTRAL.parent), "--use_megablocks_sharding", "True"]
    wanted, _ = parse_known_args([*words, *line.split()], entry_point=entry_point)
    found, leftovers = parse_known_args(["--config", str(path)], entry_point=entry_point)
    assert found == wanted
    assert [given.words() for given in leftovers] == ([more.split()] if more else [])
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"options": asdict(wanted)}))
    code, again, _ = run(f"--print_config --run {record}", capsys, model=None)
    assert (code, again) == (0, out.removesuffix("adam_beta1: '0.9'\n"))
    code, _, err = run(f"--print_config --run {record} --seed 1", capsys, model=None)
    assert (code, err) == (2, f"--run is {record}, but options of a run are given beside it; give "
                           "one of the two.\n")  # fmt: skip
    path.write_text(f"learning_rate: fast\n{out}")
    code, _, err = run(contract(f"--config {path}"), capsys, model=None)
    assert code == 2 and err.startswith(f"{path}:")


def test_a_file_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def fail(path, record):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plan, "write_json_atomically", fail)
    path = tmp_path / "plan.json"
    code, _, err = run(contract(f"--json {path}"), capsys)
    assert (code, err) == (2, f"--json is {path}, but it cannot be written (Permission denied).\n")


def test_help_and_calibrate_are_reached(capsys):
    code, out, err = run("--help", capsys, model=None)
    assert (code, err) == (0, "") and out.startswith("usage: python -m megablocks_utils.plan ")
    code, out, _ = run("calibrate --help", capsys, model=None)
    assert code == 0 and "--nproc N" in out


def test_a_plan_needs_no_torch_and_no_terminal():
    """In a fresh process: nothing heavy is imported, and lines are 120 wide at most."""
    code = (
        "import sys; from megablocks_utils.processes.entry_point import run_entry_point; "
        "from megablocks_utils.plan import main; run_entry_point(main, sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    line = [sys.executable, "-c", code, str(MIXTRAL), *CONTRACT.split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if not line.endswith("\\")]
    assert max(map(len, lines)) <= 120


def test_the_page_shows_what_the_command_prints(capsys, monkeypatch):
    """After a change of the formulas, the example in docs/planning.md has to be renewed."""
    monkeypatch.delenv("COLUMNS", raising=False)
    page = (MODELS.parents[1] / "docs" / "planning.md").read_text()
    shown = page[page.index("    benchmarks/models/") : page.index("Below stand")]
    command = re.search(r"plan (benchmarks/.*?)\n\n", page, flags=re.DOTALL)[1]
    monkeypatch.chdir(MODELS.parents[1])
    code, out, _ = run(command.replace("\\\n", " "), capsys, model=None)
    assert code == 0
    printed = [line.rstrip() for line in out.splitlines()]
    wanted = [line.removeprefix("    ") for line in shown.rstrip().splitlines()]
    assert printed[: len(wanted)] == wanted


def test_own_errors_are_users_errors():
    with pytest.raises(ConfigurationError):
        plan.main(["m"])


@pytest.mark.parametrize("device", ["/dev/null", "/proc/self/fd/1", "/dev/full"])
def test_json_for_a_device_is_sent_there(tmp_path, device):
    path = tmp_path / "device"  # a link: code that is broken must not replace the device itself
    path.symlink_to(device)
    line = [sys.executable, "-m", "megablocks_utils.plan", str(MIXTRAL), *CONTRACT.split()]
    answer = subprocess.run([*line, "--json", str(path)], capture_output=True, text=True)
    assert path.is_symlink()
    if device == "/dev/full":
        assert (answer.returncode, answer.stderr) == (
            2,
            f"--json is {path}, but it cannot be written (No space left on device).\n",
        )
        return
    assert answer.returncode == 0, answer.stderr
    if device == "/proc/self/fd/1":
        assert json.loads(answer.stdout[answer.stdout.index("\n{") :])["rows"]


def write_loads(path, share, layers=2, rows=1000):
    names = [f"model.layers.{n}.block_sparse_moe.experts" for n in range(layers)]
    lines = [
        describe_layer(name, [rows * s for s in share], [[rows]], None).__dict__ for name in names
    ]
    path.write_text("".join(json.dumps({"step": 1} | line) + "\n" for line in lines))
    return path


def test_loads_say_what_a_placement_saves(tmp_path, capsys):
    path = write_loads(tmp_path / "expert_load.jsonl", [0.3, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0])
    code, out, err = run(contract(f"--loads {path} --ep_size 4"), capsys)
    assert (code, err) == (0, "")
    assert re.search(r"layers.1.block_sparse_moe.experts +60.0% -> 32.0%", out)
    assert "the busiest rank has 2.40 times its fair share of rows, 1.28 times with" in out
    other = write_loads(tmp_path / "other.jsonl", [0.5, 0.5])
    for line, words in {
        f"--loads {other}": "experts are 2, and those of this model are 8: it must be of",
        f"--loads {tmp_path / 'none'}": "none, but it must be an expert_load.jsonl, as --expert_lo",
        f"--loads {path} --gpus 8..16": f"--loads is {path}, but --gpus is 8..16; it must be one",
    }.items():
        code, out, err = run(contract(line), capsys)
        assert (code, out) == (2, "")
        assert words in err and err.startswith("--loads is ")
