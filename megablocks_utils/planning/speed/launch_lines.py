"""The command that starts a planned run."""

import re
import shlex
from collections.abc import Sequence

from megablocks_utils.planning.model.prediction import ParallelLayout

__all__ = ["LAYOUT_OPTIONS", "break_line", "build_head", "build_launch", "list_run_options"]

LAYOUT_OPTIONS = ("ep_size", "expert_degree", "expert_dp", "use_megablocks_sharding")
"""What a layout decides, so that the user's own are replaced."""

_HEAD = ("--rdzv_backend", "c10d", "--rdzv_endpoint")
_PORT = 29500
# Not within quotes: as many of them follow as close.
_OPTION_START = re.compile(r" --(?=(?:[^']*'[^']*')*[^']*$)")


def build_launch(
    model: str,
    layout: ParallelLayout,
    *,
    entry_point: str,
    gpus: int,
    gpus_per_node: int,
    words: list[str],
) -> str:
    """Return the command in one line, quoted for a shell; `$HEAD_NODE` is the first node's name.

    Args:
        model: folder or Hub name.
        layout: how the experts are spread.
        entry_point: `fsdp2` or `fsdp1`.
        gpus: of all nodes.
        gpus_per_node: of one.
        words: the user's other training options.
    """
    head = build_head(entry_point, gpus, max(1, gpus // gpus_per_node))
    return " ".join([*head, *list_run_options(model, layout, entry_point, words)])


def build_head(entry_point: str, gpus: int, nodes: int) -> list[str]:
    """Return the launcher with its options, and the script."""
    return _torchrun(gpus, nodes) if entry_point == "fsdp2" else _accelerate(gpus, nodes)


def list_run_options(
    model: str, layout: ParallelLayout, entry_point: str, words: Sequence[str]
) -> list[str]:
    """Return the options of the run, quoted for a shell; arguments as of `build_launch`."""
    own = ["--model_name_or_path", model, *_layout_words(layout, entry_point)]
    return [shlex.quote(word) for word in (*own, *words)]


def break_line(command: str, width: int) -> str:
    """Break a command between options, so that it can be copied as it is shown."""
    lines, options = [], _OPTION_START.split(command)
    line = options[0]
    for option in options[1:]:
        piece = f" --{option}"
        if len(line + piece) + 2 > width:
            lines.append(f"{line} \\")
            line = f"  --{option}"
        else:
            line += piece
    return "\n".join([*lines, line])


def _torchrun(gpus: int, nodes: int) -> list[str]:
    if nodes == 1:
        meeting = ["--standalone"]
    else:
        meeting = [f"--nnodes={nodes}", *_HEAD, f"$HEAD_NODE:{_PORT}"]
    return ["torchrun", *meeting, f"--nproc_per_node={gpus // nodes}", "train_accelerate_fsdp2.py"]


def _accelerate(gpus: int, nodes: int) -> list[str]:
    machines: Sequence[str] = ()
    if nodes > 1:
        machines = (
            f"--num_machines {nodes} --machine_rank $NODE_RANK --main_process_ip $HEAD_NODE "
            f"--main_process_port {_PORT}"
        ).split()
    launcher = ["accelerate", "launch", "--num_processes", str(gpus), *machines]
    return [*launcher, "--config_file", "accelerate.yaml", "train_fsdp1.py"]


def _layout_words(layout: ParallelLayout, entry_point: str) -> list[str]:
    if layout.ep_size == 1 and not layout.is_dmoe:
        return ["--use_megablocks_sharding", "False"]
    words = ["--use_megablocks_sharding", "True", "--ep_size", str(layout.ep_size)]
    # FSDP1 knows no other way than copies.
    return words + (["--expert_dp", layout.expert_dp] if entry_point == "fsdp2" else [])
