"""Measure the experts of a model on this GPU: `python -m megablocks_utils.tune --help`.

Torch is imported when the options are good, so `--help` answers at once.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megablocks_utils.config.option import Option
from megablocks_utils.config.options import find_option
from megablocks_utils.config.reader import convert_value, describe_wanted
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.command_output import read_words
from megablocks_utils.processes.launch import run_entry_point

if TYPE_CHECKING:
    from rich.table import Table

    from megablocks_utils.kernels.device import DeviceFacts
    from megablocks_utils.kernels.shapes import ExpertShapes
    from megablocks_utils.kernels.tuning.measure_layer import LayerTimes
    from megablocks_utils.kernels.tuning.measurements import Entry
    from megablocks_utils.kernels.tuning.tile_search import TimeMs

__all__ = [
    "TuneOptions",
    "build_table",
    "main",
    "parse_options",
    "read_shapes",
    "tune",
]

HELP = """\
usage: python -m megablocks_utils.tune --model_name_or_path DIR --tokens N [--option value] ...

Measures one layer of a model's experts on this GPU, forward and backward, with every kernel that
can run here, and this project's Triton kernels with the tiles that may suit them. What was found is
kept on disk, and --kernel auto and --kernel triton of later runs go by it, on the same GPU, with
the same versions of torch and triton. Random weights: of the model only config.json is read. One
process.

  --model_name_or_path DIR
      The model: local folder or Hub name.
  --tokens N
      Tokens of a micro-batch of one process: per_device_train_batch_size times the mean length of
      an example. What is found counts for this number and others up to the next power of two.
  --ep_size N
      The --ep_size of the run.
      Default: 1.
  --use_lora {none|attn-only|mlp-only|all}
      The --use_lora of the run: it says which expert parameters are trained.
      Default: none.
  --lora_r N
      Rank of adapters on the experts.
      Default: 16.
  --dtype {float32|bfloat16}
      What the run computes in.
      Default: bfloat16.

The file is kernels.json in the folder that MEGABLOCKS_UTILS_CACHE names, by default
~/.cache/megablocks_utils (XDG_CACHE_HOME counts).

Exit codes: 0 done; 2 a bad option, or no GPU, said in one sentence; 1 anything unexpected.
"""
_TOKENS = Option("tokens", "integer", None, help="tokens of a micro-batch", minimum=1)
_NAMES = ("model_name_or_path", "ep_size", "use_lora", "lora_r", "dtype")
_OPTIONS = {option.name: option for option in (_TOKENS, *map(find_option, _NAMES))}
_MODES = {"none": "full", "attn-only": "frozen", "mlp-only": "lora", "all": "lora"}


@dataclass(frozen=True)
class TuneOptions:
    """Hold the options; each means what it means to a training run."""

    model_name_or_path: str
    tokens: int
    ep_size: int = 1
    use_lora: str = "none"
    lora_r: int = 16
    dtype: str = "bfloat16"


def main(argv: Sequence[str]) -> None:
    """Look for a GPU, and tune.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options that cannot work, a machine without a GPU, or a damaged file.
    """
    options = parse_options(argv)
    from megablocks_utils.kernels.device import has_gpu, read_device_facts
    from megablocks_utils.kernels.tuning.tile_search import time_on_cuda

    if not has_gpu():
        raise ConfigurationError("tune measures on a CUDA GPU, but torch finds none here.")
    tune(options, read_device_facts("cuda"), "cuda", time_on_cuda)


def tune(options: TuneOptions, facts: "DeviceFacts", device: str, time_ms: "TimeMs") -> None:
    """Measure as the options say, keep what was found, and show it.

    Args:
        options: what to measure.
        facts: what the device is.
        device: where the layer lies.
        time_ms: measures.

    Raises:
        UserError: a model or layer that cannot be measured, or a damaged file of measurements.
    """
    from rich.console import Console

    from megablocks_utils.kernels.tuning.measure_layer import build_entry, measure_layer
    from megablocks_utils.kernels.tuning.measurements import cache_path, read_entries, store_entry

    path = cache_path()
    read_entries(path)  # a damaged file is refused before the work
    shapes = read_shapes(options)
    with Console(stderr=True).status("measuring ...") as status:
        measured = measure_layer(
            shapes,
            facts,
            device,
            lora_r=options.lora_r,
            time_ms=time_ms,
            on_trial=lambda trial: status.update(f"measuring {trial.kind} ..."),
        )
    entry = build_entry(measured, shapes, facts, options.lora_r)
    store_entry(entry, path)
    console = Console(highlight=False)
    console.print(build_table(options.model_name_or_path, entry, measured))
    line = f"auto takes {measured.fastest} for this; written to {path}"
    console.print(line, markup=False, soft_wrap=True)


def parse_options(argv: Sequence[str]) -> TuneOptions:
    """Read the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name or value that cannot be used.
    """
    given = read_words(
        argv,
        tuple(_OPTIONS),
        required=("model_name_or_path", "tokens"),
        help_text=HELP,
        wanted={name: describe_wanted(option) for name, option in _OPTIONS.items()},
    )
    values = {
        name: convert_value(_OPTIONS[name], f"--{name}", text) for name, text in given.items()
    }
    return TuneOptions(**values)


def read_shapes(options: TuneOptions) -> "ExpertShapes":
    """Read the sizes of the model's experts, as a run with these options would have them.

    Raises:
        CheckpointError: no config.json, or not of a model whose experts can be run.
        ConfigurationError: an ep_size that does not divide the experts.
    """
    from megablocks_utils.checkpoint.index import resolve_checkpoint_folder
    from megablocks_utils.checkpoint.load import build_model_on_meta
    from megablocks_utils.kernels.selection.rank_agreement import ExpertUse
    from megablocks_utils.kernels.shapes import find_dtype
    from megablocks_utils.shard_moe_utils import find_expert_modules

    folder = resolve_checkpoint_folder(options.model_name_or_path, patterns=("config.json",))
    model = build_model_on_meta(folder)
    experts = next(iter(find_expert_modules(model).values()))
    if experts.num_experts % options.ep_size:
        raise ConfigurationError(
            f"--ep_size is {options.ep_size}, but it must divide the {experts.num_experts} experts "
            "of this model."
        )
    use = ExpertUse("cuda", find_dtype(options.dtype), _MODES[options.use_lora], options.tokens)
    return use.shapes(model, experts, options.ep_size)


def build_table(model: str, entry: "Entry", measured: "LayerTimes") -> "Table":
    """Lay out the search for tiles, and all backends below it."""
    from rich.table import Table
    from rich.text import Text

    key = entry.key
    rank = "" if entry.lora_r is None else f" (rank {entry.lora_r})"
    title = (
        f"{model} on {key.gpu}: {key.num_local_experts} experts of {key.hidden_size} x "
        f"{key.intermediate_size}, {key.rows:,} rows, {key.dtype}, {key.mode}{rank}"
    )
    table = Table(
        "kernel",
        "rows x columns x depth",
        title=Text(title),
        title_justify="left",
    )
    for name in ("warps", "stages", "layer, ms"):
        table.add_column(name, justify="right")
    table.add_column("")
    search = measured.search
    if search is not None:
        table.add_row("all", "as the package has them", "", "", _format_ms(search.start_ms), "")
    for trial in search.trials if search is not None else ():
        tile = trial.tile
        table.add_row(
            trial.kind,
            f"{tile.block_m} x {tile.block_n} x {tile.block_k}",
            str(tile.num_warps),
            str(tile.num_stages),
            _format_ms(trial.time_ms),
            "taken" if trial.is_taken else "",
        )
    table.add_section()
    for name, time_ms in measured.times_ms.items():
        mark = "fastest" if name == measured.fastest else ""
        table.add_row(name, "", "", "", _format_ms(time_ms), mark)
    return table


def _format_ms(time_ms: float) -> str:
    return "out of memory" if math.isinf(time_ms) else f"{time_ms:.2f}"


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
