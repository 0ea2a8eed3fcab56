"""The words of `python -m megablocks_utils.plan`: its own options, MODEL, and a run's options."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megablocks_utils.config import RunConfig, parse_args, parse_known_args
from megablocks_utils.config.option import Option
from megablocks_utils.config.options import OPTIONS, find_option
from megablocks_utils.config.reader import (
    HelpRequested,
    check_no_dtype_flags,
    convert_value,
    describe_wanted,
    read_arguments,
)
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.scenario import DEFAULT_IMBALANCE
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.speed.launch_lines import LAYOUT_OPTIONS

__all__ = ["OWN_OPTIONS", "PlanOptions", "ParsedArguments", "check_names", "parse_plan_options"]
__all__ += ["read_model", "split_words"]

_FILE = "a file to write"
OWN_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        option.name: option
        for option in (
            Option("gpus", "text", "8", help="GPUs of the run"),
            Option("gpu", "text", None, help="kind of GPU", choices=tuple(GPUS)),
            Option("gpu_mem_gib", "number", None, help="memory of a GPU in GiB", above=0),
            Option("gpus_per_node", "integer", None, help="GPUs of a node", minimum=1),
            Option(
                "imbalance",
                "number",
                DEFAULT_IMBALANCE,
                help="rows of the hottest rank over its fair share",
                minimum=1,
            ),
            Option("entry_point", "text", "fsdp2", help="script", choices=("fsdp2", "fsdp1")),
            Option("json", "text", None, help=_FILE),
            Option("plot", "text", None, help=_FILE),
            Option("calibration", "text", None, help="file of plan calibrate"),
            Option("check", "text", None, help="run.json of a run"),
        )
    }
)
_GPUS = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class ParsedArguments:
    """The command line, sorted.

    Attributes:
        positional: words that belong to no option.
        own: values of the command's own options, by name.
        groups: (name, its words) of every other option, in order.
    """

    positional: tuple[str, ...]
    own: Mapping[str, Any]
    groups: tuple[tuple[str, tuple[str, ...]], ...]

    def training(self, without: Sequence[str] = ()) -> list[str]:
        """Return the words of a run's options, as they were given."""
        return [word for name, words in self.groups if name not in without for word in words]


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked for.

    Attributes:
        model: folder, config.json or Hub name.
        own: the command's own options by name, defaults where not given.
        world_sizes: ranks to plan for, one or more.
        config: the options of the run.
        words: those of them that any layout's command has, as given.
        ep_size: where only this one is asked for.
        expert_dp: likewise.
        passed_on: options of Hugging Face's TrainingArguments, which are not read.
    """

    model: str
    own: Mapping[str, Any]
    world_sizes: tuple[int, ...]
    config: RunConfig
    words: tuple[str, ...]
    ep_size: int | None
    expert_dp: str | None
    passed_on: tuple[str, ...]


def split_words(
    argv: Sequence[str], own: Mapping[str, Option] = OWN_OPTIONS, *, help_text: str
) -> ParsedArguments:
    """Tell the command's own options from MODEL and from those of a run.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a name that neither knows, or a value that cannot be used.
    """
    words, positional, groups = list(argv), [], []
    given: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            raise HelpRequested(help_text)
        if not word.startswith("--"):
            positional.append(word)
            continue
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name in own:
            if not has_value and words and not words[0].startswith("--"):
                value = words.pop(0)
            given[name] = _read_own(own[name], value)
            continue
        takes_many = _takes_many(name)
        group = [word]
        while not has_value and words and not words[0].startswith("-"):
            group.append(words.pop(0))
            if not takes_many:
                break
        groups.append((name, tuple(group)))
    values = {name: option.default for name, option in own.items()} | given
    return ParsedArguments(tuple(positional), values, tuple(groups))


def parse_plan_options(words: ParsedArguments) -> PlanOptions:
    """Check the words of a plan, the run's by the parser of the scripts.

    Raises:
        ConfigurationError: for a word, value or combination that cannot be used.
    """
    own = dict(words.own)
    check_names(words, own["entry_point"])
    if own["gpu"] is None and own["gpu_mem_gib"] is None:
        raise ConfigurationError(
            f"--gpu is not given, but it must be {describe_wanted(OWN_OPTIONS['gpu'])}, or give "
            "--gpu_mem_gib."
        )
    world_sizes = _read_world_sizes(own["gpus"])
    for name in ("json", "plot"):
        _check_output(name, own[name])
    config, given, leftovers = _read_run(words, own["entry_point"])
    return PlanOptions(
        model=read_model(words, given),
        own=own,
        world_sizes=world_sizes,
        config=config,
        words=tuple(words.training(without=(*LAYOUT_OPTIONS, "model_name_or_path"))),
        ep_size=1
        if not config.parallel.use_megablocks_sharding and _has_sharding_word(given)
        else given.get("ep_size"),
        expert_dp=given.get("expert_dp"),
        passed_on=tuple(word for word in leftovers if word.startswith("--")),
    )


def _has_sharding_word(given: Mapping[str, Any]) -> bool:
    return "use_megablocks_sharding" in given


def _read_run(
    words: ParsedArguments, entry_point: str
) -> tuple[RunConfig, dict[str, Any], list[str]]:
    """Read the run's options; asking for a layout is asking for expert parallelism."""
    training = words.training()
    given, leftovers = read_arguments(training, entry_point, keep_unknown=entry_point == "fsdp1")
    if {"ep_size", "expert_dp"} & set(given) and not _has_sharding_word(given):
        training += ["--use_megablocks_sharding", "True"]
    if entry_point == "fsdp2":
        return parse_args(training, entry_point=entry_point), given, []
    check_no_dtype_flags(leftovers)
    return parse_known_args(training, entry_point=entry_point)[0], given, leftovers


def read_model(words: ParsedArguments, given: Mapping[str, Any]) -> str:
    """Return MODEL, which the run's own option may name too.

    Raises:
        ConfigurationError: none, or more than one.
    """
    named = list(words.positional)
    if "model_name_or_path" in given and named != [given["model_name_or_path"]]:
        named.append(str(given["model_name_or_path"]))
    if not named:
        raise ConfigurationError(
            "MODEL is not given, but it must be a model folder, a config.json, or a Hub name in "
            "the local cache."
        )
    if len(named) > 1:
        raise ConfigurationError(
            f"MODEL is {named[0]}, but {named[1]} stands beside it; give one, and options as "
            "--name value."
        )
    return named[0]


def _read_own(option: Option, text: str) -> Any:
    flag = f"--{option.name}"
    if not text:
        raise ConfigurationError(f"{flag} has no value, but it must be {_wanted(option)}.")
    return convert_value(option, flag, text)


def _wanted(option: Option) -> str:
    if option.name == "gpus":
        return "a whole number of at least 1, or two of them as in 8..4096"
    return option.help if option.help == _FILE else describe_wanted(option)


def _read_world_sizes(text: str) -> tuple[int, ...]:
    match = _GPUS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        wanted = _wanted(OWN_OPTIONS["gpus"])
        raise ConfigurationError(f"--gpus is {text}, but it must be {wanted}.")
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes)


def _check_output(name: str, text: str | None) -> None:
    if text is None:
        return
    path = Path(text)
    wanted = "it must be a file in a folder that is there"
    if path.is_dir():
        raise ConfigurationError(f"--{name} is {text}, but that is a folder; {wanted}.")
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"--{name} is {text}, but {path.parent} is no folder; {wanted}.")


def _takes_many(name: str) -> bool:
    """Whether all words up to the next option are its values, as the parser of the scripts has it.

    So are those of an option that only Hugging Face's TrainingArguments may know.
    """
    option = find_option(name)
    return option is None or option.kind == "words"


def check_names(
    words: ParsedArguments, entry_point: str, own: Mapping[str, Option] = OWN_OPTIONS
) -> None:
    """Refuse an option that nobody knows; under FSDP1, only what looks like a slip.

    TrainingArguments has the rest there, and asking it would take seconds. None of its names is as
    near to one of ours as the cutoff.

    Raises:
        ConfigurationError: naming the nearest of both sets of options.
    """
    of_run = [name for option in OPTIONS for name in (option.name, *option.aliases)]
    known = [*own, *of_run]
    cutoff = 0.0 if entry_point == "fsdp2" else 0.88
    for name, group in words.groups:
        if name in of_run:
            continue
        flag = group[0].partition("=")[0]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if nearest:
            raise ConfigurationError(f"unknown option {flag}; did you mean --{nearest[0]}?")
