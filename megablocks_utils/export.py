"""Turn a checkpoint into a Hugging Face model: `python -m megablocks_utils.export --help`.

Reads the checkpoint tensor by tensor, whatever number of ranks has written it; no process group and
no GPU. Torch is imported when the options are good, so `--help` answers at once.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.precision import SAVE_DTYPE_OPTION
from megablocks_utils.config.reader import build_section, read_command
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.command_output import (
    OUTPUT_OPTION,
    check_output,
    removed_on_error,
    show_progress,
)
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.output_folder import (
    MANIFEST_NAME,
    find_checkpoints,
    follow_pointer,
)

__all__ = [
    "COMMAND",
    "ExportOptions",
    "export_adapter_layout",
    "export_checkpoint",
    "main",
    "parse_options",
]

# Name -> shape and dtype (named Any, since torch is not imported yet).
Stored = Mapping[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class ExportOptions:
    """Hold the options."""

    output: Annotated[Path, OUTPUT_OPTION]
    checkpoint: Annotated[
        Path | None,
        Option(
            "the checkpoint: a folder checkpoint-<step> of a run, or the checkpoint-latest beside "
            "it",
            metavar="DIR",
            wanted="a folder",
            shown_default="none; this or --adapter is needed",
        ),
    ] = None
    adapter: Annotated[
        str | None,
        Option(
            "a finished adapter to write in another layout: local folder or Hub name",
            metavar="DIR",
            wanted="a folder or Hub name",
        ),
    ] = None
    adapter_layout: Annotated[
        str | None,
        Option(
            "per-expert: one LoRA pair for each expert and projection, which vLLM and SGLang load; "
            "needs --adapter",
            choices=("per-expert",),
        ),
    ] = None
    model_name_or_path: Annotated[
        str | None,
        Option(
            "the adapter's base model, whose configuration and names are read: local folder or Hub "
            "name",
            metavar="BASE",
            shown_default="base_model_name_or_path of the adapter's configuration",
        ),
    ] = None
    save_dtype: Annotated[
        str | None, replace(SAVE_DTYPE_OPTION, shown_default="that of the checkpoint")
    ] = None


COMMAND = Command(
    usage=(
        "python -m megablocks_utils.export --checkpoint DIR --output DIR [--save_dtype DTYPE]",
        "python -m megablocks_utils.export --adapter DIR --adapter_layout per-expert --output DIR",
    ),
    about=(
        "Writes the model of a checkpoint as an ordinary Hugging Face folder, which transformers "
        "loads: with the Hub's own tensor names, configuration and tokenizer. A checkpoint of a "
        "LoRA run becomes a PEFT adapter. The training processes are not needed, nor as many "
        "processes as have written it. Every file is compared with its checksum first. Memory: one "
        "layer's experts (an adapter: all of it).",
        "With --adapter, writes a PEFT adapter in the layout that servers load, and compares what "
        "it wrote, turned back, bit for bit. Where a server could not apply it, says so and writes "
        "nothing.",
    ),
    options=list_options(ExportOptions),
)


def main(argv: Sequence[str]) -> None:
    """Export as the options say, and write a line on what was written.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options or files that cannot be used.
    """
    options = parse_options(argv)
    export = export_checkpoint if options.adapter is None else export_adapter_layout
    sys.stdout.write(f"{export(options)}\n")


def parse_options(argv: Sequence[str]) -> ExportOptions:
    """Read the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word or name that is not known, or a value that is missing.
    """
    options = build_section(ExportOptions, read_command(argv, COMMAND)[0])
    _refuse_combinations(options)
    return options


def _refuse_combinations(options: ExportOptions) -> None:
    if (options.checkpoint is None) == (options.adapter is None):
        given = "neither is" if options.adapter is None else "both are"
        raise ConfigurationError(f"--checkpoint or --adapter must be given, but {given}.")
    source, refused = "--adapter", ["save_dtype"]
    if options.adapter is None:
        source, refused = "--checkpoint", ["adapter_layout", "model_name_or_path"]
    for name in refused:
        if value := getattr(options, name):
            raise ConfigurationError(f"--{name} is {value}, but {source} takes no such option.")
    if options.adapter is not None and options.adapter_layout is None:
        raise ConfigurationError(
            "--adapter_layout is not given, but --adapter is; it must be per-expert."
        )


def export_adapter_layout(options: ExportOptions) -> str:
    """Write an adapter as servers load it, and return a line that says what was done.

    Raises:
        ConfigurationError: an output that cannot be used, or an adapter that no server applies.
        CheckpointError: an adapter or base that cannot be read, or a disk that is full.
    """
    check_output(options.output)
    from megablocks_utils.lora.per_expert_export import export_per_expert

    with removed_on_error(options.output):
        num_pairs, rank = export_per_expert(
            str(options.adapter),
            options.output,
            base_name_or_path=options.model_name_or_path,
            show_progress=show_progress,
        )
    what = f"{num_pairs} LoRA pairs of rank {rank}"
    return f"wrote {options.output}: {what}; turned back they are {options.adapter} bit for bit"


def export_checkpoint(options: ExportOptions) -> str:
    """Write the model or adapter of a checkpoint, and return a line that says what was done.

    Raises:
        ConfigurationError: a folder that is no checkpoint, or an output that cannot be used.
        CheckpointError: a damaged checkpoint, or a disk that is full.
    """
    check_output(options.output)
    if options.checkpoint is None:
        raise ConfigurationError("--checkpoint is not given, but it must be a folder.")
    _check_is_checkpoint(options.checkpoint)
    from megablocks_utils.checkpoint.distributed_checkpoint import MODEL_PREFIX, read_stored_tensors
    from megablocks_utils.checkpoint.manifest import check_files
    from megablocks_utils.checkpoint.run_manifest import adapters_of, read_run_manifest

    folder = follow_pointer(options.checkpoint).resolve()
    manifest = read_run_manifest(folder)
    lora = adapters_of(manifest)
    if lora is not None and options.save_dtype is not None:
        raise ConfigurationError(
            f"--save_dtype is {options.save_dtype}, but {folder} is of a LoRA run and becomes an "
            "adapter, in the dtype it was trained in; leave it out, or give it to "
            "megablocks_utils.merge."
        )
    check_files(folder, manifest["files"], manifest["files"])
    stored = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in read_stored_tensors(folder).items()
        if name.startswith(MODEL_PREFIX)
    }
    with removed_on_error(options.output):
        if lora is None:
            _export_model(folder, manifest, stored, options)
        else:
            _export_adapter(folder, manifest, lora, stored, options.output)
    kind = "model" if lora is None else "adapter"
    return f"wrote {options.output}: the {kind} after step {manifest['step']}"


def _check_is_checkpoint(folder: Path) -> None:
    seen = f"--checkpoint is {folder}, but"
    folder = follow_pointer(folder)
    if not folder.is_dir():
        raise ConfigurationError(f"{seen} that is no folder; it must be a checkpoint of a run.")
    if not (folder / MANIFEST_NAME).is_file():
        inside = find_checkpoints(folder)
        hint = f", such as {inside[-1][1]}" if inside else ""
        raise ConfigurationError(
            f"{seen} that holds no {MANIFEST_NAME}; it must be a complete checkpoint{hint}."
        )


def _export_model(
    folder: Path, manifest: Mapping[str, Any], stored: Stored, options: ExportOptions
) -> None:
    from megablocks_utils.checkpoint.load import build_model_on_meta
    from megablocks_utils.checkpoint.model_folder import WrittenModel, export_model
    from megablocks_utils.checkpoint.saved_dtype import choose_saved_dtypes
    from megablocks_utils.checkpoint.stored_model import StoredModel
    from megablocks_utils.checkpoint.tokenizer import load_tokenizer

    model = build_model_on_meta(folder)
    model.tie_weights()
    source = StoredModel(folder, stored, model, manifest.get("base"))
    saved_dtype = choose_saved_dtypes(model, options.save_dtype)
    num_bytes = sum(_count_bytes(*spec[1:]) for spec in source.specs)
    with show_progress("exporting", num_bytes) as advance:
        export_model(
            WrittenModel(
                source.layout,
                model.config,
                getattr(model, "generation_config", None),
                load_tokenizer(folder),
                base=source.base,
                files=folder,
            ),
            [(name, shape, saved_dtype(name, dtype)) for name, shape, dtype in source.specs],
            source.tensors(advance),
            options.output,
            is_writer=True,
        )


def _export_adapter(
    folder: Path,
    manifest: Mapping[str, Any],
    lora: Mapping[str, Any],
    stored: Stored,
    output: Path,
) -> None:
    from megablocks_utils.checkpoint.load import build_model_on_meta
    from megablocks_utils.checkpoint.run_manifest import COMPATIBILITY_KEY
    from megablocks_utils.checkpoint.tokenizer import load_tokenizer
    from megablocks_utils.lora.adapter_files import export_adapter
    from megablocks_utils.lora.settings import LoraSettings

    with show_progress("exporting", sum(_count_bytes(*s) for s in stored.values())) as advance:
        export_adapter(
            LoraSettings.from_record(lora),
            load_tokenizer(folder),
            _read_tensors(folder, stored, sorted(stored), advance),
            output,
            base_model=partial(build_model_on_meta, folder),
            base_model_name=manifest["options"]["model"]["model_name_or_path"],
            is_writer=True,
            weight_format=manifest[COMPATIBILITY_KEY].get("expert_quantization"),
        )


def _read_tensors(
    folder: Path, stored: Stored, names: Sequence[str], advance: Callable[[int], None]
) -> Iterator[tuple[str, Any]]:
    """Yield one whole tensor after the other; none is held while the next one is read."""
    from megablocks_utils.checkpoint.distributed_checkpoint import MODEL_PREFIX, read_whole_tensor

    for name in names:
        yield name, read_whole_tensor(MODEL_PREFIX + name, *stored[name], folder)
        advance(_count_bytes(*stored[name]))


def _count_bytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
