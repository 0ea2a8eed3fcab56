"""Measure the experts of a model on this GPU: `python -m megablocks_utils.tune --help`.

Torch is imported when the options are good, so `--help` answers at once.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megablocks_utils.config.adapter import DEFAULT_LORA_R, EXPERT_MODE_OF, AdapterConfig
from megablocks_utils.config.backends import AUTO
from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options, same_option
from megablocks_utils.config.parallel import check_ep_size
from megablocks_utils.config.precision import TRAINING_DTYPES
from megablocks_utils.config.quantization import (
    NO_QUANTIZATION,
    check_quantization,
    find_format,
)
from megablocks_utils.config.reader import build_section, read_command
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import MODEL_CONFIG_NAME
from megablocks_utils.processes.entry_point import run_entry_point

if TYPE_CHECKING:
    from rich.table import Table

    from megablocks_utils.kernels.device import DeviceFacts
    from megablocks_utils.kernels.shapes import ExpertShapes
    from megablocks_utils.kernels.tuning.measure_layer import LayerTimes
    from megablocks_utils.kernels.tuning.measurements import Entry
    from megablocks_utils.kernels.tuning.tile_search import TimeMs

__all__ = [
    "COMMAND",
    "TuneOptions",
    "build_table",
    "main",
    "parse_options",
    "read_shapes",
    "tune",
]


@dataclass(frozen=True)
class TuneOptions:
    """Hold the options; each means what it means to a training run."""

    model_name_or_path: Annotated[
        str, Option("the model: local folder or Hub name", metavar="MODEL")
    ]
    tokens: Annotated[
        int,
        Option(
            "tokens of a micro-batch of one process: per_device_train_batch_size times the mean "
            "length of an example; what is found counts for this number and others up to the next "
            "power of two",
            minimum=1,
        ),
    ]
    ep_size: Annotated[int, Option("the --ep_size of the run", minimum=1)] = 1
    use_lora: Annotated[
        str,
        same_option(
            AdapterConfig,
            "use_lora",
            help="the --use_lora of the run: it says which expert parameters are trained",
        ),
    ] = "none"
    lora_r: Annotated[
        int, same_option(AdapterConfig, "lora_r", help="rank of adapters on the experts")
    ] = DEFAULT_LORA_R
    dtype: Annotated[
        str,
        Option("dtype that the run computes in", choices=TRAINING_DTYPES, aliases=("torch_dtype",)),
    ] = "bfloat16"
    expert_quantization: Annotated[
        str,
        same_option(
            AdapterConfig,
            "expert_quantization",
            help="the --expert_quantization of the run; triton looks nf4 and mxfp4 up as it "
            "multiplies, other kernels get the numbers",
        ),
    ] = NO_QUANTIZATION


COMMAND = Command(
    usage=(
        "python -m megablocks_utils.tune --model_name_or_path MODEL --tokens N [--option value] "
        "...",
    ),
    about=(
        "Measures one layer of a model's experts on this GPU, forward and backward, with every "
        "kernel that can run here, and this project's Triton kernels with the tiles that may suit "
        "them. What was found is kept on disk, and --kernel auto and --kernel triton of later runs "
        "go by it, on the same GPU, with the same versions of torch and triton. Random weights: of "
        "the model only config.json is read. One process.",
    ),
    options=list_options(TuneOptions),
    closing=(
        "The file is kernels.json in the folder that MEGABLOCKS_UTILS_CACHE names, by default "
        "~/.cache/megablocks_utils (XDG_CACHE_HOME counts).",
        "Exit codes: 0 done; 2 a bad option, or no GPU, said in one sentence; 1 anything "
        "unexpected.",
    ),
)


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
    options = build_section(TuneOptions, read_command(argv, COMMAND)[0])
    named = {"expert_quantization": options.expert_quantization}
    any_kernel = {"kernel": AUTO, "use_scattermoe": False}
    check_quantization({**named, **any_kernel}, has_lora=options.use_lora != "none")
    return options


def read_shapes(options: TuneOptions) -> "ExpertShapes":
    """Read the sizes of the model's experts, as a run with these options would have them.

    Raises:
        CheckpointError: no config.json, or not of a model whose experts can be run.
        ConfigurationError: an ep_size that does not divide the experts.
    """
    from megablocks_utils.checkpoint.index import resolve_checkpoint_folder
    from megablocks_utils.checkpoint.load import build_model_on_meta
    from megablocks_utils.kernels.shapes import find_dtype
    from megablocks_utils.moe.expert_use import ExpertUse
    from megablocks_utils.moe.model_facts import find_top_k
    from megablocks_utils.shard_moe_utils import require_experts

    folder = resolve_checkpoint_folder(options.model_name_or_path, patterns=(MODEL_CONFIG_NAME,))
    model = build_model_on_meta(folder)
    spec = next(iter(require_experts(model).values()))
    check_ep_size(options.ep_size, num_experts=spec.num_experts)
    mode, dtype = EXPERT_MODE_OF[options.use_lora], find_dtype(options.dtype)
    weight_format = find_format(options.expert_quantization)
    use = ExpertUse("cuda", dtype, mode, options.tokens, weight_format)
    return use.shapes(spec, dtype, find_top_k(model), options.ep_size)


def build_table(model: str, entry: "Entry", measured: "LayerTimes") -> "Table":
    """Lay out the search for tiles, and all backends below it."""
    from rich.table import Table
    from rich.text import Text

    key = entry.key
    rank = "" if entry.lora_r is None else f" (rank {entry.lora_r})"
    title = (
        f"{model} on {key.gpu}: {key.num_local_experts} experts of {key.hidden_size} x "
        f"{key.intermediate_size}, {key.rows:,} rows, {key.dtype}, {key.mode}{rank}, {key.form}"
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
        mark = ", persistent" if tile.programs_per_processor else ""
        table.add_row(
            trial.kind,
            f"{tile.block_m} x {tile.block_n} x {tile.block_k}{mark}",
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
