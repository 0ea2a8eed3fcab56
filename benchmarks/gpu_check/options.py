"""The command line of the check. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.reader import build_section, read_command
from megablocks_utils.errors import ConfigurationError

TITLES: Mapping[int, str] = MappingProxyType(
    {
        1: "the GPU tests, side by side",
        2: "end to end: backends, precisions and checkpointing against a CPU in fp32",
        3: "tiles of the kernels, then one MoE layer against others",
        4: "memory of a rank of eight against the plan",
        5: "a step's trace, packed attention and the optimizer's kernel",
    }
)


@dataclass(frozen=True)
class CheckOptions:
    """Hold the options; `COMMAND` says what they mean."""

    part: Annotated[
        int,
        Option(
            "; ".join(f"{number}: {title}" for number, title in TITLES.items()),
            minimum=min(TITLES),
            maximum=max(TITLES),
        ),
    ]
    output: Annotated[
        str,
        Option(
            "folder of the results: part<N>.json, and of every row what its program wrote",
            metavar="DIR",
        ),
    ]
    device: Annotated[
        str,
        Option(
            "cuda; or cpu, which tries a part out on a tiny scale and measures nothing",
            choices=("cuda", "cpu"),
        ),
    ] = "cuda"
    minutes: Annotated[
        float, Option("time of the part; what does not fit is a row that says so", above=0)
    ] = 8.5
    only: Annotated[
        str, Option("rows whose names hold all these words", shown_default="all rows")
    ] = ""


COMMAND = Command(
    usage=("python -m benchmarks.gpu_check --part N --output DIR [--option value] ...",),
    about=(
        "Checks and measures on one GPU, in parts of under nine minutes. The JSON file is written "
        "whole after every row; a row that fails says why, and the others go on.",
    ),
    options=list_options(CheckOptions),
    closing=(
        "Exit codes: 0 no row failed (rows that were not reached, or need a package, say so); 1 a "
        "row failed; 2 a bad option or no GPU, said in one sentence.",
    ),
)


def parse_options(argv: Sequence[str]) -> CheckOptions:
    """Read the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name or value that cannot be used.
    """
    options = build_section(CheckOptions, read_command(argv, COMMAND)[0])
    if Path(options.output).exists() and not Path(options.output).is_dir():
        raise ConfigurationError(f"--output is {options.output}, but it must be a folder.")
    return options
