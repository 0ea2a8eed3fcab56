"""The command line of the table. Imports no torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table.rows import PUBLISHED_RANKS, ROWS, Row
from megablocks_utils.config.option import Option
from megablocks_utils.config.options import default_of
from megablocks_utils.config.reader import convert_value, describe_wanted, join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.command_output import read_words

PLAN, ONE_GPU, CPU, REAL = MODES = ("plan", "one_gpu", "cpu", "real")
RESULTS = Path(__file__).parents[1] / "results"
_NUM_EXPERTS = 8

HELP = f"""\
usage: python -m benchmarks.table --plan | --one_gpu | --cpu | --real [--option value] ...

The benchmark table: the eight published rows, ours, and transformers' own expert parallelism, as
published, predicted and measured. Exactly one mode:

  --plan
      Predictions only: memory, no GPU, no model.
  --one_gpu
      Memory on one GPU: rank 0 of {PUBLISHED_RANKS} (others fake), with real tensors and kernels.
  --cpu
      Time and memory with a small random Mixtral on real ranks of this machine (gloo).
  --real
      Time and memory with the model itself, on as many GPUs as there are ranks.

  --rows NAME[,NAME...]
      Of {", ".join(row.name for row in ROWS)}.
      Default: all.
  --ranks N
      Processes, even; with --real one a GPU. ep8 and ep4 in the names of rows mean all and half
      of them. Published figures stand beside {PUBLISHED_RANKS} ranks only.
      Default: {PUBLISHED_RANKS} with --real, 4 with --cpu.
  --tokens N
      Tokens of every example, but with --cpu. About 210 is the mean of Alpaca's; a run's peak is
      that of its longest, and Alpaca's longest has 1304 (LitGPT's docs, Llama 2's tokenizer).
      Default: 256.
  --steps N
      Optimizer steps that are measured, in every run.
      Default: 20 with --real, 1 with --cpu.
  --warmup_steps N
      Optimizer steps before them.
      Default: 10 with --real, 1 with --cpu.
  --rounds N
      Runs of every row, in turns.
      Default: 1 with --real, 5 with --cpu.
  --model_name_or_path DIR
      With --real, the model: local folder or Hub name.
      Default: {default_of("model_name_or_path")}.
  --scratch DIR
      With --real, where runs write: a full row leaves the whole model there until it has ended.
      Default: the system's folder for temporary files.
  --output FILE
      The JSON file; a Markdown table (.md) and a plot (.png) are written beside it.
      Default: table_<mode>.json in benchmarks/results.
  --docs FILE
      A Markdown file, whose part between `<!-- table: <mode> -->` and `<!-- end -->` becomes the
      table.
      Default: none.

Exit codes: 0 done, also where rows could not run (they say why); 2 a bad option, or a mode that
this machine cannot run, said in one sentence; 1 anything unexpected.
"""
_OPTIONS = {
    option.name: option
    for option in (
        Option("rows", "text", None, help="rows"),
        Option("ranks", "integer", None, help="processes", minimum=2),
        Option("tokens", "integer", None, help="tokens", minimum=2),
        Option("steps", "integer", None, help="steps", minimum=1),
        Option("warmup_steps", "integer", None, help="steps before", minimum=0),
        Option("rounds", "integer", None, help="runs of a row", minimum=1),
        Option("model_name_or_path", "text", None, help="model"),
        Option("scratch", "text", None, help="folder"),
        Option("output", "text", None, help="file"),
        Option("docs", "text", None, help="file"),
    )
}
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
    """Hold the options of a table; `HELP` says what they mean."""

    mode: str
    rows: tuple[Row, ...]
    output: Path
    ranks: int = PUBLISHED_RANKS
    tokens: int = 256
    steps: int = 20
    warmup_steps: int = 10
    rounds: int = 1
    model_name_or_path: str = str(default_of("model_name_or_path"))
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
    modes, words = _split_modes(argv)
    given = read_words(
        words,
        (*_OPTIONS, *MODES),
        required=(),
        help_text=HELP,
        wanted={name: describe_wanted(option) for name, option in _OPTIONS.items()},
    )
    if len(modes) != 1:
        seen = join_words([f"--{mode}" for mode in modes], "and") if modes else "no mode"
        wanted = join_words([f"--{mode}" for mode in MODES])
        raise ConfigurationError(f"{seen} given, but it must be exactly one of {wanted}.")
    mode = modes[0]
    for name in given:
        if name not in _TAKEN[mode]:
            raise ConfigurationError(f"--{name} is {given[name]}, but --{mode} does not take it.")
    values: dict[str, Any] = {
        name: convert_value(_OPTIONS[name], f"--{name}", given[name]) for name in given
    }
    values["rows"] = _read_rows(values.get("rows"))
    values["output"] = Path(values.get("output", RESULTS / f"table_{mode}.json")).absolute()
    options = TableOptions(mode, **_DEFAULTS.get(mode, {}) | values)
    _check(options)
    return options


def _split_modes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take out the modes, which have no value."""
    flags = {f"--{mode}": mode for mode in MODES}
    modes = dict.fromkeys(flags[word] for word in argv if word in flags)
    return list(modes), [word for word in argv if word not in flags]


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
