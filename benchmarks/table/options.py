"""The command line of the table. Imports no torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from benchmarks.table.rows import PUBLISHED_RANKS, ROWS, Row
from megablocks_utils.config import ModelConfig
from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.reader import read_command
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError

PLAN, ONE_GPU, CPU, REAL = MODES = ("plan", "one_gpu", "cpu", "real")
RESULTS = Path(__file__).parents[1] / "results"
_NUM_EXPERTS = 8


@dataclass(frozen=True)
class _Words:
    """Declare the options as they are typed; `TableOptions` holds what they mean."""

    plan: Annotated[bool, Option("predictions only: memory, no GPU, no model")] = False
    one_gpu: Annotated[
        bool,
        Option(
            f"memory on one GPU: rank 0 of {PUBLISHED_RANKS}, the others fake, with real tensors "
            "and kernels"
        ),
    ] = False
    cpu: Annotated[
        bool,
        Option("time and memory with a small random Mixtral on real ranks of this machine (gloo)"),
    ] = False
    real: Annotated[
        bool,
        Option("time and memory with the model itself, on as many GPUs as there are ranks"),
    ] = False
    rows: Annotated[
        str | None,
        Option(
            f"of {', '.join(row.name for row in ROWS)}",
            metavar="NAME[,NAME...]",
            shown_default="all",
        ),
    ] = None
    ranks: Annotated[
        int | None,
        Option(
            "processes, even; with --real one a GPU; ep8 and ep4 in the names of rows mean all and "
            f"half of them; published figures stand beside {PUBLISHED_RANKS} ranks only",
            minimum=2,
            shown_default=f"{PUBLISHED_RANKS} with --real, 4 with --cpu",
        ),
    ] = None
    tokens: Annotated[
        int | None,
        Option(
            "tokens of every example, but with --cpu; about 210 is the mean of Alpaca's; a run's "
            "peak is that of its longest, and Alpaca's longest has 1304 (LitGPT's docs, Llama 2's "
            "tokenizer)",
            minimum=2,
            shown_default="256",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Option(
            "optimizer steps that are measured, in every run",
            minimum=1,
            shown_default="20 with --real, 1 with --cpu",
        ),
    ] = None
    warmup_steps: Annotated[
        int | None,
        Option(
            "optimizer steps before them", minimum=0, shown_default="10 with --real, 1 with --cpu"
        ),
    ] = None
    rounds: Annotated[
        int | None,
        Option(
            "runs of every row, in turns", minimum=1, shown_default="1 with --real, 5 with --cpu"
        ),
    ] = None
    model_name_or_path: Annotated[
        str | None,
        Option(
            "with --real, the model: local folder or Hub name",
            metavar="MODEL",
            shown_default=ModelConfig.model_name_or_path,
        ),
    ] = None
    scratch: Annotated[
        str | None,
        Option(
            "with --real, where runs write: a full row leaves the whole model there until it has "
            "ended",
            metavar="DIR",
            shown_default="the system's folder for temporary files",
        ),
    ] = None
    output: Annotated[
        str | None,
        Option(
            "the JSON file; a Markdown table (.md) and a plot (.png) are written beside it",
            metavar="FILE",
            shown_default="table_<mode>.json in benchmarks/results",
        ),
    ] = None
    docs: Annotated[
        str | None,
        Option(
            "a Markdown file, whose part between `<!-- table: <mode> -->` and `<!-- end -->` "
            "becomes the table",
            metavar="FILE",
            shown_default="none",
        ),
    ] = None


COMMAND = Command(
    usage=("python -m benchmarks.table --plan | --one_gpu | --cpu | --real [--option value] ...",),
    about=(
        "The benchmark table: the eight published rows, ours, and transformers' own expert "
        "parallelism, as published, predicted and measured. Exactly one mode.",
    ),
    options=list_options(_Words),
    closing=(
        "Exit codes: 0 done, also where rows could not run (they say why); 2 a bad option, or a "
        "mode that this machine cannot run, said in one sentence; 1 anything unexpected.",
    ),
)
_ALWAYS = ("rows", "output", "docs")
_TIMED = ("ranks", "steps", "warmup_steps", "rounds")
_TAKEN = {
    PLAN: (*_ALWAYS, "tokens"),
    ONE_GPU: (*_ALWAYS, "tokens"),
    CPU: (*_ALWAYS, *_TIMED),
    REAL: (*_ALWAYS, *_TIMED, "tokens", "model_name_or_path", "scratch"),
}


@dataclass(frozen=True)
class TableOptions:
    """Hold the options of a table; `COMMAND` says what they mean."""

    mode: str
    rows: tuple[Row, ...]
    output: Path
    ranks: int = PUBLISHED_RANKS
    tokens: int = 256
    steps: int = 20
    warmup_steps: int = 10
    rounds: int = 1
    model_name_or_path: str = ModelConfig.model_name_or_path
    scratch: str | None = None
    docs: str | None = None


_DEFAULTS: dict[str, dict[str, Any]] = {
    CPU: {"ranks": 4, "steps": 1, "warmup_steps": 1, "rounds": 5}
}


def parse_options(argv: Sequence[str]) -> TableOptions:
    """Read the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name, value or combination that cannot be used.
    """
    words, _ = read_command(argv, COMMAND)
    modes = [name for name, is_on in words.items() if name in MODES and is_on]
    given = {name: value for name, value in words.items() if name not in MODES}
    if len(modes) != 1:
        seen = join_words([f"--{mode}" for mode in modes], "and") if modes else "no mode"
        wanted = join_words([f"--{mode}" for mode in MODES])
        raise ConfigurationError(f"{seen} given, but it must be exactly one of {wanted}.")
    mode = modes[0]
    for name in given:
        if name not in _TAKEN[mode]:
            raise ConfigurationError(f"--{name} is {given[name]}, but --{mode} does not take it.")
    values: dict[str, Any] = _DEFAULTS.get(mode, {}) | given
    values["rows"] = _read_rows(values.get("rows"))
    values["output"] = Path(values.get("output", RESULTS / f"table_{mode}.json")).absolute()
    options = TableOptions(mode, **values)
    _check(options)
    return options


def _read_rows(text: str | None) -> tuple[Row, ...]:
    if text is None:
        return ROWS
    by_name = {row.name: row for row in ROWS}
    wanted = {name.strip() for name in text.split(",")}
    for name in wanted:
        if name not in by_name:
            nearest = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"--rows names {name}, but no row; did you mean {nearest}?")
    return tuple(row for row in ROWS if row.name in wanted)


def _check(options: TableOptions) -> None:
    ranks = options.ranks
    if ranks % 2 or _NUM_EXPERTS % ranks:
        raise ConfigurationError(
            f"--ranks is {ranks}, but it must be 2, 4 or {_NUM_EXPERTS}: the experts are split "
            f"over all ranks and over half of them, and there are {_NUM_EXPERTS}."
        )
    if options.output.suffix != ".json":
        raise ConfigurationError(f"--output is {options.output.name}, but it must end in .json.")
    if not options.output.parent.is_dir():
        raise ConfigurationError(
            f"--output is {options.output}, but {options.output.parent} is not a folder."
        )
    if options.docs is not None and not Path(options.docs).is_file():
        raise ConfigurationError(f"--docs is {options.docs}, but it must be a file.")
    if options.scratch is not None and not Path(options.scratch).is_dir():
        raise ConfigurationError(f"--scratch is {options.scratch}, but it must be a folder.")
