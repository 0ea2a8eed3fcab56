"""Write the adapters of a run as a PEFT folder that plain PEFT loads."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.library_errors import DiskErrorsAsOSErrors
from megablocks_utils.checkpoint.writer import staged_folder
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    GENERATION_CONFIG_NAME,
    remove_path,
)
from megablocks_utils.lora.file_check import AdapterCheckError
from megablocks_utils.lora.peft_format import (
    expert_key,
    linear_key,
    pack_lora_a,
    pack_lora_b,
)
from megablocks_utils.lora.settings import LoraSettings, build_peft_config

REFUSED_NAME = "refused_adapter"
_LINEAR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight")
_EXPERT = re.compile(r"(?P<parameter>.+)_lora\.lora_(?P<side>[AB])")


def export_adapter(
    settings: LoraSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, Tensor | None]],
    output_dir: str | Path,
    *,
    base_model_name: str,
    is_writer: bool,
    generation_config: GenerationConfig | None = None,
    check: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write adapter weights, their configuration and the tokenizer, complete or not at all.

    **Collective:** none here; but `tensors` usually gathers, so every rank must call.

    Args:
        settings: of the adapters.
        tokenizer: written too, if given.
        tensors: each adapter parameter's name in the model and whole tensor (None where not
            writer).
        output_dir: the folder.
        base_model_name: what PEFT will load the adapter onto.
        is_writer: whether this rank writes.
        generation_config: written too, if given: where generation with the adapter stops.
        check: called with the folder that holds the complete files, before they are moved into
            place. If it refuses them, they are kept in `refused_adapter` of the folder.

    Raises:
        AdapterCheckError: from `check`, with the folder of the files.
        CheckpointError: likewise, for values that are not finite; or the folder cannot be written.
    """
    weights = {}
    for name, tensor in tensors:
        if is_writer and tensor is not None:
            key, stored = to_peft(name, tensor)
            weights[key] = stored
    if not is_writer:
        return
    config = build_peft_config(settings, base_model_name)
    config.inference_mode = True
    try:
        with staged_folder(Path(output_dir), last=ADAPTER_CONFIG_NAME) as folder:
            with DiskErrorsAsOSErrors():
                save_file(weights, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
                config.save_pretrained(str(folder))
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                if generation_config is not None:
                    generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
            try:
                check(folder)
            except (AdapterCheckError, CheckpointError) as error:
                kept = _keep_for_inspection(folder, Path(output_dir))
                raise type(error)(f"{error}; the files are in {kept}") from error
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the adapter to {output_dir}: {reason}") from error


def _keep_for_inspection(folder: Path, output_dir: Path) -> Path:
    """Move a refused adapter to a folder whose name says so."""
    kept = output_dir / REFUSED_NAME
    remove_path(kept)
    folder.rename(kept)
    return kept


def to_peft(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return the name and the form in which PEFT stores an adapter parameter.

    Args:
        name: in the model, `...q_proj.lora_A.default.weight` or
            `...mlp.experts.gate_up_proj_lora.lora_A`.
        tensor: whole.
    """
    if match := _LINEAR.fullmatch(name):
        return linear_key(match["layer"], match["side"]), tensor
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name} is not a parameter of an adapter")
    pack = pack_lora_a if match["side"] == "A" else pack_lora_b
    return expert_key(match["parameter"], match["side"]), pack(tensor).contiguous()
