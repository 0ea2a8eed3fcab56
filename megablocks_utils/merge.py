"""Merge a LoRA adapter into its base model: `python -m megablocks_utils.merge --help`.

Streams tensor by tensor, so that a model of any size needs the memory of its largest tensor; no
process group and no GPU. Torch is imported when the options are good, so `--help` answers at once.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.precision import SAVE_DTYPE_OPTION
from megablocks_utils.config.quantization import NO_QUANTIZATION, QUANTIZATIONS
from megablocks_utils.config.reader import build_section, read_command
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import GENERATION_CONFIG_NAME
from megablocks_utils.processes.command_output import (
    OUTPUT_OPTION,
    check_output,
    removed_on_error,
    show_progress,
)
from megablocks_utils.processes.entry_point import run_entry_point

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from megablocks_utils.checkpoint.index import CheckpointIndex
    from megablocks_utils.checkpoint.writer import TensorSpec
    from megablocks_utils.lora.merge_weights import AdapterMerger
    from megablocks_utils.lora.rounded_base import RoundedBase

__all__ = ["COMMAND", "MergeOptions", "main", "merge_adapter", "parse_options"]

# Files of the adapter that win over the base's: what it was trained with, and where it stops.
TRAINED_COMPANIONS = (GENERATION_CONFIG_NAME, "chat_template.jinja")


@dataclass(frozen=True)
class MergeOptions:
    """Hold the options; `model_name_or_path` None takes the name in the adapter's configuration."""

    adapter: Annotated[
        str,
        Option(
            "the adapter: local folder or Hub name, with adapter_config.json and "
            "adapter_model.safetensors; both PEFT's own format for experts and that of adapters "
            "made with transformers 4 (one per expert) are read",
            metavar="DIR",
            wanted="a folder or Hub name",
        ),
    ]
    output: Annotated[Path, OUTPUT_OPTION]
    model_name_or_path: Annotated[
        str | None,
        Option(
            "the base model: local folder or Hub name",
            metavar="BASE",
            shown_default="base_model_name_or_path of the adapter's configuration",
        ),
    ] = None
    save_dtype: Annotated[
        str | None, replace(SAVE_DTYPE_OPTION, shown_default="that of each of the base's tensors")
    ] = None

    expert_quantization: Annotated[
        str,
        Option(
            "merge into experts as this format keeps them: what a run with --expert_quantization "
            "has trained on, written in the dtype of the base",
            choices=QUANTIZATIONS,
        ),
    ] = NO_QUANTIZATION


COMMAND = Command(
    usage=(
        "python -m megablocks_utils.merge --adapter DIR --output DIR [--model_name_or_path BASE]",
    ),
    about=(
        "Merges a PEFT LoRA adapter into its base model and writes an ordinary Hugging Face model "
        "folder, with the base's own tensor names and dtypes, its configuration and its tokenizer. "
        "Equals PEFT's merge_and_unload. Memory: the largest tensor of the base. No GPU.",
    ),
    options=list_options(MergeOptions),
)


def main(argv: Sequence[str]) -> None:
    """Merge as the options say, and write a line on what was written.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options or files that cannot be used.
    """
    options = parse_options(argv)
    sys.stdout.write(f"{merge_adapter(options)}\n")


def parse_options(argv: Sequence[str]) -> MergeOptions:
    """Read the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word or name that is not known, or a value that is missing.
    """
    return build_section(MergeOptions, read_command(argv, COMMAND)[0])


def merge_adapter(options: MergeOptions, *, max_shard_bytes: int | None = None) -> str:
    """Write the base model with the adapter merged in; return a line that says what was done.

    Args:
        options: adapter, base and output.
        max_shard_bytes: largest size of one weight file; None is that of a run's own model.

    Raises:
        ConfigurationError: the output folder cannot be used, or no base model is named.
        CheckpointError: an adapter or base that cannot be used, or a disk that is full.
    """
    check_output(options.output)
    from megablocks_utils.checkpoint.index import open_checkpoint, resolve_checkpoint_folder
    from megablocks_utils.checkpoint.layouts import ModelLayout
    from megablocks_utils.checkpoint.load import build_model_on_meta
    from megablocks_utils.checkpoint.model_check import check_against_model
    from megablocks_utils.checkpoint.saved_dtype import choose_saved_dtypes
    from megablocks_utils.checkpoint.writer import TensorSpec
    from megablocks_utils.lora.adapter_reader import (
        find_base_name,
        open_adapter,
        resolve_adapter_folder,
    )
    from megablocks_utils.lora.merge_weights import AdapterMerger
    from megablocks_utils.lora.rounded_base import RoundedBase
    from megablocks_utils.lora.trained_format import read_trained_format

    adapter_folder = resolve_adapter_folder(options.adapter)
    base = resolve_checkpoint_folder(find_base_name(options.model_name_or_path, adapter_folder))
    model = build_model_on_meta(base)
    dtype = model.config.dtype
    index = open_checkpoint(base, dtype=None if isinstance(dtype, str) else dtype)
    saved_dtype = choose_saved_dtypes(model, options.save_dtype)
    specs = [TensorSpec(key, index.shape(key), saved_dtype(key, index.dtype(key))) for key in index]
    if options.save_dtype or not dtype:
        model.config.dtype = saved_dtype("", index.dtype(next(iter(index))))
    layout = ModelLayout(model, index)
    check_against_model(model, index, layout)
    in_format = partial(RoundedBase, index, layout, model)
    is_own = options.expert_quantization == NO_QUANTIZATION
    base_index = index if is_own else in_format(options.expert_quantization)
    trained_on = read_trained_format(adapter_folder)
    merger = AdapterMerger(open_adapter(adapter_folder, model), base_index, layout)
    try:
        with removed_on_error(options.output):
            folders = (index.folder, adapter_folder)
            _write(merger, specs, model.config, folders, options.output, max_shard_bytes)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the model to {options.output}: {reason}") from error
    changed = sum(merger.is_changed(key) for key in index)
    written_bytes = sum(spec.num_bytes for spec in specs)
    line = (
        f"wrote {options.output}: {changed} of {len(index.keys())} tensors changed,"
        f" {written_bytes:,} bytes"
    )
    notes = _list_notes(base_index, in_format, trained_on, options.expert_quantization)
    return "\n".join((*index.notes, *notes, line))


def _list_notes(
    base: "CheckpointIndex | RoundedBase",
    in_format: "Callable[[str], RoundedBase]",
    trained_on: str,
    merged_into: str,
) -> Iterator[str]:
    """Say how far off the experts are that the adapter was merged into, or was trained on."""
    from megablocks_utils.lora.rounded_base import RoundedBase

    if isinstance(base, RoundedBase):
        yield f"experts are those that {merged_into} keeps, {100 * base.error:.2g} % off the base's"
    if merged_into == NO_QUANTIZATION != trained_on and in_format(trained_on).is_exact:
        return  # the base's own are those that it was trained on
    if trained_on != merged_into:
        yield (
            f"the adapter was trained on experts in {trained_on}: --expert_quantization "
            f"{trained_on} merges it into these"
        )


def _list_companions(base: Path, adapter: Path) -> list[Path]:
    """Return the files to copy, those of the adapter last; none is a link out of its folder."""
    from megablocks_utils.checkpoint.companions import find_companions

    return [*find_companions(base), *find_companions(adapter, TRAINED_COMPANIONS)]


def _write(
    merger: "AdapterMerger",
    specs: "list[TensorSpec]",
    config: "PreTrainedConfig",
    folders: tuple[Path, Path],
    output: Path,
    max_shard_bytes: int | None,
) -> None:
    from megablocks_utils.checkpoint.companions import write_companions
    from megablocks_utils.checkpoint.model_folder import MAX_SHARD_BYTES
    from megablocks_utils.checkpoint.writer import SafetensorsWriter, staged_folder

    sizes = {spec.name: spec.num_bytes for spec in specs}
    with (
        staged_folder(output) as folder,
        SafetensorsWriter(
            folder, specs, max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES
        ) as writer,
        show_progress("merging", sum(sizes.values())) as advance,
    ):
        for key, tensor in merger.tensors():
            writer.append(key, tensor)
            advance(sizes[key])
            # Else it would still be held while the next one is read.
            del tensor
        dtype = specs[0].dtype if isinstance(config.dtype, str | None) else config.dtype
        write_companions(config, None, None, dtype, folder, base=folders[0])
        for path in _list_companions(*folders):
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
