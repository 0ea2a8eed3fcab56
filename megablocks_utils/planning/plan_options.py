"""What `python -m megablocks_utils.plan` is asked: its own options, MODEL, and those of a run."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megablocks_utils.config import RunConfig
from megablocks_utils.config.adapter import AdapterConfig
from megablocks_utils.config.entry_points import SCRIPTS, read_run_options
from megablocks_utils.config.given import CommandLine, GivenOption, split_line
from megablocks_utils.config.hints import find_slip, unknown_option
from megablocks_utils.config.reader import build_section, choose_model, refuse_unknown, scan_words
from megablocks_utils.config.secrets import redact_words
from megablocks_utils.config.values import describe_wanted
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.model.adapter_rank import read_adapter_rank
from megablocks_utils.planning.model.gpus import DEFAULT_GPU, GPUS
from megablocks_utils.planning.plan_arguments import COMMAND, MAX_GPUS, PlanArguments
from megablocks_utils.planning.speed.launch_lines import LAYOUT_OPTIONS

__all__ = [
    "PlanOptions",
    "build_plan_options",
    "check_output_file",
    "list_words",
    "parse_plan_options",
    "read_arguments",
    "read_run",
    "write_output_file",
]

_SLIP_OF_OURS = 0.88
"""No name of TrainingArguments is as like one of ours."""
_GPUS = re.compile(r"([0-9]{1,40})(?:\.\.([0-9]{1,40}))?")
_ASKS_FOR_EP = frozenset({"ep_size", "expert_dp", "expert_tp_size", "tp_size"})
_OF_A_LAYOUT = (*LAYOUT_OPTIONS, "model_name_or_path")
_LAUNCHED = {"torchrun": "fsdp2", "accelerate": "fsdp1"}


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked for.

    Attributes:
        model: folder, config.json or Hub name.
        own: the command's own options.
        world_sizes: ranks to plan for, one or more.
        config: the options of the run.
        words: those of them that any layout's command has.
        ep_size: where only this one is asked for.
        expert_dp: likewise.
        passed_on: options of Hugging Face's TrainingArguments, which are not read.
    """

    model: str
    own: PlanArguments
    world_sizes: tuple[int, ...]
    config: RunConfig
    words: tuple[str, ...]
    ep_size: int | None
    expert_dp: str | None
    passed_on: tuple[str, ...]


def read_arguments(argv: Sequence[str]) -> tuple[PlanArguments, CommandLine]:
    """Read the command's own options; the line that is left has MODEL and those of a run.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a name that neither knows, or a value that cannot be used.
    """
    line = scan_words(argv, COMMAND)
    own, rest = split_line(line, COMMAND.options)
    given = own.read_values()
    arguments = _settle(build_section(PlanArguments, given), given)
    if arguments.entry_point == "fsdp2":
        refuse_unknown(rest.given, COMMAND.names)
    else:
        _refuse_slips(rest.given)
    return arguments, rest


def parse_plan_options(argv: Sequence[str]) -> PlanOptions:
    """Read the command line of a plan, the run's options by the reader of the scripts.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, value or combination that cannot be used.
    """
    own, line = read_arguments(argv)
    return build_plan_options(own, line)


def build_plan_options(own: PlanArguments, line: CommandLine) -> PlanOptions:
    """Check what a plan is asked for.

    Args:
        own: the command's own options.
        line: MODEL and the options of a run.

    Raises:
        ConfigurationError: for a word, value or combination that cannot be used.
        CheckpointError: for an adapter to resume whose settings cannot be read.
    """
    if own.gpu is None and own.gpu_mem_gib is None:
        gpu = next(option for option in COMMAND.options if option.name == "gpu")
        raise ConfigurationError(
            f"--gpu is not given, but it must be {describe_wanted(gpu)}, or give --gpu_mem_gib."
        )
    world_sizes = _read_world_sizes(own.gpus)
    for name, path in (("json", own.json), ("plot", own.plot)):
        if path is not None:
            check_output_file(name, Path(path))
    config, leftovers = read_run(line, own.entry_point)
    config = replace(config, adapter=_with_rank(config.adapter))
    given = {option.name: option.read() for option in line.given if option.option is not None}
    has_no_ep = given.get("use_megablocks_sharding") is False
    return PlanOptions(
        model=choose_model(line),
        own=own,
        world_sizes=world_sizes,
        config=config,
        words=tuple(redact_words(list_words(line.given, without=_OF_A_LAYOUT))),
        ep_size=1 if has_no_ep else config.parallel.ep_size,
        expert_dp=config.parallel.expert_dp if given.get("expert_dp") else None,
        passed_on=tuple(option.flag for option in leftovers),
    )


def read_run(line: CommandLine, entry_point: str) -> tuple[RunConfig, tuple[GivenOption, ...]]:
    """Read the options of a run; asking for a layout is asking for expert parallelism.

    Returns:
        The configuration, and the options that are TrainingArguments'.

    Raises:
        ConfigurationError: for a value or combination that cannot work.
    """
    names = {option.name for option in line.given}
    if _ASKS_FOR_EP & names and "use_megablocks_sharding" not in names:
        switch = SCRIPTS[entry_point].find("use_megablocks_sharding")
        sharding = GivenOption("--use_megablocks_sharding", ("True",), switch)
        line = CommandLine(line.positional, (*line.given, sharding))
    return read_run_options(line, entry_point)


def _with_rank(adapter: AdapterConfig) -> AdapterConfig:
    """Take the rank of an adapter to resume, which a run refuses to take otherwise."""
    source, given = adapter.resume_adapter, adapter.lora_r
    if source is None:
        return adapter
    rank = read_adapter_rank(source)
    if rank is None and given is None:
        raise ConfigurationError(
            f"--resume_adapter is {source}, but its rank is not known: there is neither such an "
            "adapter here nor one in the local cache of the Hub, and nothing is downloaded; give "
            "--lora_r."
        )
    if None not in (rank, given) and rank != given:
        raise ConfigurationError(f"--lora_r is {given}, but the adapter {source} has {rank}.")
    return replace(adapter, lora_r=rank or given)


def list_words(given: Iterable[GivenOption], without: Sequence[str] = ()) -> list[str]:
    """Return options as words of a command line, apart from some."""
    return [word for option in given if option.name not in without for word in option.words()]


def check_output_file(name: str, path: Path) -> None:
    """Refuse a file that is a folder, or in a folder that is not there.

    Raises:
        ConfigurationError: naming the option.
    """
    wanted = "it must be a file in a folder that exists"
    if os.path.isdir(path):  # `Path.is_dir` raises for a name that is too long
        raise ConfigurationError(f"--{name} is {path}, but that is a folder; {wanted}.")
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--{name} is {path}, but {path.parent} is no folder; {wanted}.")


def write_output_file(name: str, path: str, write: Callable[[Path], None]) -> None:
    """Write a file that an option names.

    Raises:
        ConfigurationError: it cannot be written.
    """
    try:
        write(Path(path))
    except OSError as error:
        raise ConfigurationError(
            f"--{name} is {path}, but it cannot be written ({error.strerror})."
        ) from error


def _settle(own: PlanArguments, given: Mapping[str, object]) -> PlanArguments:
    """Work out what follows from `--launcher` and `--nodes`.

    Raises:
        ConfigurationError: where they and other options cannot both be.
    """
    if own.launcher == "accelerate" and "entry_point" not in given:
        own = replace(own, entry_point="fsdp1")
    if own.launcher in _LAUNCHED and own.entry_point != _LAUNCHED[own.launcher]:
        raise ConfigurationError(
            f"--launcher is {own.launcher}, but --entry_point is {own.entry_point}, and "
            f"{own.launcher} starts {_LAUNCHED[own.launcher]}."
        )
    if own.nodes is not None:
        own = _spread_over_nodes(own, own.nodes, is_gpus_given="gpus" in given)
    for name in ("launcher", "loads"):
        value = getattr(own, name)
        if value is not None and ".." in own.gpus:
            raise ConfigurationError(
                f"--{name} is {value}, but --gpus is {own.gpus}; it must be one number."
            )
    return own


def _spread_over_nodes(own: PlanArguments, nodes: int, *, is_gpus_given: bool) -> PlanArguments:
    if not is_gpus_given:
        per_node = own.gpus_per_node or GPUS[own.gpu or DEFAULT_GPU].gpus_per_node
        return replace(own, gpus=str(nodes * per_node))
    gpus = _read_world_sizes(own.gpus)
    if len(gpus) > 1 or gpus[0] % nodes:
        raise ConfigurationError(
            f"--nodes is {nodes}, but --gpus is {own.gpus}; it must be a multiple of it."
        )
    per_node = gpus[0] // nodes
    if own.gpus_per_node not in (None, per_node):
        raise ConfigurationError(
            f"--gpus_per_node is {own.gpus_per_node}, but --gpus {own.gpus} on --nodes {nodes} "
            f"are {per_node} a node."
        )
    return replace(own, gpus_per_node=per_node)


def _refuse_slips(given: Iterable[GivenOption]) -> None:
    """Refuse what looks like a slip: FSDP1's TrainingArguments have the rest.

    Asking them would take seconds.
    """
    for option in given:
        if option.option is None and find_slip(option.name, COMMAND.names, _SLIP_OF_OURS):
            raise option.located(unknown_option(option.flag, COMMAND.names))


def _read_world_sizes(text: str) -> tuple[int, ...]:
    match = _GPUS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        gpus = next(option for option in COMMAND.options if option.name == "gpus")
        raise ConfigurationError(f"--gpus is {text}, but it must be {describe_wanted(gpus)}.")
    if last > MAX_GPUS:
        raise ConfigurationError(f"--gpus is {text}, but it must be at most {MAX_GPUS}.")
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)
