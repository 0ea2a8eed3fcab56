"""Write the adapters of a run as a PEFT folder that plain PEFT loads."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from megablocks_utils.checkpoint.writer import staged_folder
from megablocks_utils.errors import CheckpointError

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def export_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, torch.Tensor | None]],
    output_dir: str | Path,
    *,
    base_model_name: str,
    is_writer: bool,
) -> None:
    """Write adapter weights, their configuration and the tokenizer, complete or not at all.

    **Collective:** none here; but `tensors` usually gathers, so every rank must call.

    Args:
        model: the PEFT model (its configuration is written).
        tokenizer: written beside it if given.
        tensors: each adapter parameter's name in `model` and whole tensor (None where not writer).
        output_dir: the folder.
        base_model_name: what PEFT will load the adapter onto.
        is_writer: whether this rank writes.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    whole = dict(tensors)
    if not is_writer:
        return
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    config.base_model_name_or_path = base_model_name
    config.inference_mode = True
    weights = get_peft_model_state_dict(model, state_dict=whole)
    try:
        with staged_folder(Path(output_dir), last=_CONFIG) as folder:
            save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the adapter to {output_dir}: {reason}") from error
