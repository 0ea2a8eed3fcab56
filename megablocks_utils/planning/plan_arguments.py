"""The options that `python -m megablocks_utils.plan` has beside those of a run."""

from dataclasses import dataclass
from typing import Annotated

from megablocks_utils.config import OPTIONS
from megablocks_utils.config.command import Command
from megablocks_utils.config.entry_points import SCRIPTS
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.planning.launcher.launch_file import LAUNCHERS
from megablocks_utils.planning.memory.scenario import DEFAULT_IMBALANCE
from megablocks_utils.planning.model.gpus import GPUS

__all__ = ["COMMAND", "MAX_GPUS", "PlanArguments"]

MAX_GPUS = 10**6
"""GPUs of the largest run that is planned."""

_FILE = "a file to write"


@dataclass(frozen=True)
class PlanArguments:
    """Hold the options of the command itself."""

    gpus: Annotated[
        str,
        Option(
            "GPUs of the run; A..B plans for A, 2A, 4A ... up to B, a line each",
            metavar="{N|A..B}",
            wanted="a whole number of at least 1, or two of them as in 8..4096",
            shown_default="8, or all of --nodes",
        ),
    ] = "8"
    nodes: Annotated[
        int | None,
        Option("nodes of the run", minimum=1, limit=MAX_GPUS, shown_default="as --gpus needs"),
    ] = None
    gpu: Annotated[
        str | None,
        Option(
            "kind of GPU: its memory, speed and links",
            choices=tuple(GPUS),
            shown_default="none; needed, unless --gpu_mem_gib is given",
        ),
    ] = None
    gpu_mem_gib: Annotated[
        float | None,
        Option("memory of a GPU in GiB", above=0, limit=10**6, shown_default="what --gpu has"),
    ] = None
    gpus_per_node: Annotated[
        int | None,
        Option(
            "GPUs that share the fast link",
            minimum=1,
            limit=MAX_GPUS,
            shown_default="as --gpu is sold, 8",
        ),
    ] = None
    imbalance: Annotated[
        float,
        Option(
            "rows that the busiest rank of an ep group receives, over its fair share",
            minimum=1,
            limit=MAX_GPUS,
        ),
    ] = DEFAULT_IMBALANCE
    entry_point: Annotated[
        str,
        Option(
            "the script: train_accelerate_fsdp2.py or train_fsdp1.py",
            choices=tuple(SCRIPTS),
            shown_default="fsdp2, with --launcher accelerate fsdp1",
        ),
    ] = "fsdp2"
    launcher: Annotated[
        str | None,
        Option(
            "print a file that starts the chosen layout, and the plan on standard error: a shell "
            "script for every node, a batch script, a task or a TrainJob",
            choices=tuple(LAUNCHERS),
            shown_default="none; the report has the command",
        ),
    ] = None
    json: Annotated[
        str | None, Option("write the plan there too", metavar="FILE", wanted=_FILE)
    ] = None
    plot: Annotated[
        str | None,
        Option(
            "draw it as a PNG: a stacked bar a layout, or with A..B lines over GPUs",
            metavar="FILE",
            wanted=_FILE,
        ),
    ] = None
    calibration: Annotated[
        str | None,
        Option(
            "what calibrate has written: seconds are then estimated",
            metavar="FILE",
            shown_default="none, and no seconds are shown",
        ),
    ] = None
    loads: Annotated[
        str | None,
        Option(
            "the expert_load.jsonl of a run of this model: for each ep_size the rows of its "
            "busiest rank, layer by layer, with experts in their own order and with "
            "--expert_placement balanced, and what that saves",
            metavar="FILE",
        ),
    ] = None
    check: Annotated[
        str | None,
        Option(
            "compare what a finished run had predicted with what it measured, line by line",
            metavar="RUN_JSON",
        ),
    ] = None
    print_config: Annotated[
        bool,
        Option(
            "plan nothing: print the options of a run as YAML that --config of the scripts takes, "
            "those of this command line (the plan's own left out) or those of --run"
        ),
    ] = False
    run: Annotated[
        str | None,
        Option(
            "with --print_config, the run.json of a run, whose options are printed; options of "
            "TrainingArguments are not among them",
            metavar="RUN_JSON",
        ),
    ] = None


COMMAND = Command(
    usage=(
        "python -m megablocks_utils.plan MODEL --gpus N --gpu NAME [--option value] ...",
        "python -m megablocks_utils.plan MODEL --gpu NAME --nodes N --launcher slurm > FILE",
        "python -m megablocks_utils.plan --check RUN_JSON",
        "python -m megablocks_utils.plan [MODEL] [--option value] ... --print_config",
        "python -m megablocks_utils.plan --print_config --run RUN_JSON",
        "python -m megablocks_utils.plan calibrate MODEL --nproc N --output FILE [--option value] "
        "...",
    ),
    about=(
        "Says what a training run will need, before anything is rented or downloaded: for every "
        "legal --ep_size and --expert_dp the memory of the fullest rank by component, whether it "
        "fits, what is sent, which is fastest and why, the command that starts it, and what would "
        "make the others fit. No weights are read and no GPU is used.",
    ),
    options=list_options(PlanArguments),
    positional="MODEL",
    positional_help="a folder with a config.json, a config.json itself, or a Hub name in the local "
    "cache; --model_name_or_path names it too. Any mixture of experts that transformers can build",
    closing=(
        "Every option of the training scripts is taken with its own meaning "
        "(train_accelerate_fsdp2.py --help): --use_lora, --precision, --max_seq_length, "
        "--per_device_train_batch_size ... With --ep_size or --expert_dp only those layouts are "
        "planned, with --use_megablocks_sharding False only that without expert parallelism.",
        "calibrate makes two short runs with train_accelerate_fsdp2.py on this node and solves for "
        "the bytes a rank sends a second and the rest of a micro-step; --help after it says more.",
        "Exit codes: 0 a layout fits, or the comparison was made; 3 none fits; 2 a bad option, "
        "model or file, said in one sentence; 1 anything unexpected.",
    ),
    run_options=OPTIONS,
)
