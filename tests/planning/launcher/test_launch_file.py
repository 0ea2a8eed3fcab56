"""Launch files start the planned run: played through with schedulers that only write down."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.plan import main
from megablocks_utils.planning.plan_options import parse_plan_options

REPOSITORY = Path(__file__).parents[3]
MODEL = "benchmarks/models/mixtral-8x7b"
EXAMPLES = {
    "slurm.sbatch": "slurm --nodes 2 --gpu h100-80g",
    "skypilot.yaml": "skypilot --nodes 2 --gpu h100-80g",
    "kubeflow.yaml": "kubeflow --nodes 2 --gpu h100-80g",
}
RECORD = """\
#!/bin/bash
echo "$(basename "$0") HEAD_NODE=$HEAD_NODE NODE_RANK=$NODE_RANK $*" >> "$RECORD"
"""

COMMANDS = {
    "torchrun": RECORD,
    "accelerate": RECORD,
    "scancel": RECORD,
    "scontrol": f"{RECORD}echo node0; echo node1\n",
    "srun": f'{RECORD}shift; SLURM_NODEID=1 exec "$@"\n',
}


def write_file(words, capsys):
    """Return the file that is printed for words after `--launcher`."""
    main([MODEL, "--ep_size", "8", "--launcher", *words.split()])
    return capsys.readouterr().out


def play(script, folder, commands=None, **environment):
    """Start a shell script where the commands of schedulers and launchers only write down."""
    for name, text in (COMMANDS | (commands or {})).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    environment = {"PATH": path, "RECORD": str(folder / "record"), **environment}
    return subprocess.Popen(["bash", "-c", script], env=environment, cwd=folder)


def read_launch(folder, launcher):
    """Return what the launcher was started with: its variables and words."""
    lines = (folder / "record").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(launcher)]
    _, head, rank, *words = shlex.split(line)
    return head, rank, words


def check_options(words, script, entry_point="fsdp2"):
    """Compare the options of the script with what was planned."""
    options = words[words.index(script) + 1 :]
    read = {"fsdp2": parse_args, "fsdp1": parse_known_args}[entry_point]
    config = read(options, entry_point=entry_point)
    config = config[0] if isinstance(config, tuple) else config
    assert (config.parallel.ep_size, config.saving.resume_from_checkpoint) == (8, "auto")
    return config


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_is_printed(name, capsys):
    printed = write_file(f"{EXAMPLES[name]} --data_path data/alpaca_sample.json", capsys)
    assert (REPOSITORY / "examples" / "clusters" / name).read_text() == printed


def test_slurm_starts_a_launcher_on_every_node(tmp_path, capsys):
    script = write_file("slurm --nodes 2 --gpu h100-80g --learning_rate 1e-4", capsys)
    job = play(script, tmp_path, SLURM_JOB_NODELIST="node[0-1]", SLURM_JOB_ID="7")
    assert job.wait(20) == 0
    head, rank, words = read_launch(tmp_path, "torchrun")
    assert (head, rank) == ("HEAD_NODE=node0", "NODE_RANK=1")
    assert words[:5] == ["--nnodes=2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29500"]
    assert check_options(words, "train_accelerate_fsdp2.py").optim.learning_rate == 1e-4
    assert "requeue" not in (tmp_path / "record").read_text()


def test_slurm_saves_and_requeues_when_the_time_is_up(tmp_path, capsys):
    script = write_file("slurm --nodes 2 --gpu h100-80g", capsys)
    commands = {
        # A launcher that runs until it is told to stop, and takes a moment to save.
        "torchrun": '#!/bin/bash\ntrap "sleep 0.5; echo saved >> $RECORD; exit 1" TERM\n'
        'echo $$ > "$RECORD.pid"; while :; do sleep 0.1; done\n',
        "scancel": f'{RECORD}kill -TERM "$(cat "$RECORD.pid")"\n',
    }
    job = play(script, tmp_path, commands, SLURM_JOB_NODELIST="node[0-1]", SLURM_JOB_ID="7")
    _wait_for(tmp_path / "record.pid")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    asked, saved, requeued = (tmp_path / "record").read_text().splitlines()[-3:]
    assert asked.endswith("--signal=TERM 7")
    assert saved == "saved"
    assert requeued.endswith("requeue 7")


def _wait_for(path):
    limit_s = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit_s, path
        time.sleep(0.05)


def test_skypilot_and_kubeflow_give_each_node_its_place(tmp_path, capsys):
    task = yaml.safe_load(write_file("skypilot --nodes 2 --gpu h100-80g", capsys))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    run = task["run"].replace("source .venv/bin/activate", "")
    play(run, tmp_path, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NODE_RANK="1").wait(20)
    head, rank, words = read_launch(tmp_path, "torchrun")
    assert (head, rank) == ("HEAD_NODE=10.0.0.1", "NODE_RANK=1")
    output_dir = Path(check_options(words, "train_accelerate_fsdp2.py").output_dir)
    assert str(output_dir.parent) in task["volumes"]

    (tmp_path / "record").unlink()
    job = yaml.safe_load(write_file("kubeflow --nodes 2 --gpu h100-80g", capsys))
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    script = trainer["command"][2]
    play(script, tmp_path, PET_MASTER_ADDR="moe-node-0-0", PET_NODE_RANK="1").wait(20)
    _, _, words = read_launch(tmp_path, "torchrun")
    assert words[0] == "train_accelerate_fsdp2.py", "PET_ variables say the rest"
    check_options(words, "train_accelerate_fsdp2.py")


def test_by_hand(tmp_path, capsys):
    script = write_file("accelerate --nodes 2 --gpu h100-80g", capsys)
    refused = play(script, tmp_path, HEAD_NODE="node0")
    assert refused.wait(20) != 0, "without NODE_RANK both nodes would be the first"
    play(script, tmp_path, HEAD_NODE="node0", NODE_RANK="1").wait(20)
    _, _, words = read_launch(tmp_path, "accelerate")
    assert words[words.index("--machine_rank") + 1] == "1"
    check_options(words, "train_fsdp1.py", "fsdp1")
    assert "--standalone" in write_file("torchrun --nodes 1 --gpu h100-80g", capsys)


def test_nothing_is_printed_where_nothing_fits(capsys):
    with pytest.raises(SystemExit) as ended:
        write_file("slurm --nodes 1 --gpu a100-40g", capsys)
    assert ended.value.code == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--nodes 3 --gpus 8", "--nodes is 3, but --gpus is 8"),
        ("--nodes 2 --gpus 8 --gpus_per_node 8", "--gpus_per_node is 8, but --gpus 8 on --nodes 2"),
        ("--launcher slurm --gpus 8..64", "--gpus is 8..64; it must be one number"),
        ("--launcher torchrun --entry_point fsdp1", "torchrun starts fsdp2"),
    ],
)
def test_refusals(line, sentence):
    with pytest.raises(ConfigurationError, match=sentence.replace(".", r"\.")):
        parse_plan_options(["m", "--gpu", "a100-80g", *line.split()])


def test_nodes_are_filled():
    assert parse_plan_options(["m", "--gpu", "h100-80g", "--nodes", "4"]).world_sizes == (32,)
    options = parse_plan_options(["m", "--gpu", "h100-80g", "--nodes", "4", "--gpus", "8"])
    assert (options.world_sizes, options.own.gpus_per_node) == ((8,), 2)
