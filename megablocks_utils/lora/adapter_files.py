"""Write the adapters of a run as a PEFT folder that plain PEFT loads."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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
from megablocks_utils.lora.peft_format import ExpertPlace, find_expert_places, linear_key
from megablocks_utils.lora.peft_targets import attach_on_meta
from megablocks_utils.lora.settings import LoraSettings, build_peft_config
from megablocks_utils.lora.trained_format import build_metadata

REFUSED_NAME = "refused_adapter"
_LINEAR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight")
_EXPERT = re.compile(r"(?P<parameter>.+)_lora\.lora_(?P<side>[AB])")


def export_adapter(
    settings: LoraSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, Tensor | None]],
    output_dir: str | Path,
    *,
    base_model: Callable[[], PreTrainedModel],
    base_model_name: str,
    is_writer: bool,
    weight_format: str | None = None,
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
        base_model: builds the plain model, on meta: it says how PEFT holds adapters of experts.
        base_model_name: what PEFT will load the adapter onto.
        is_writer: whether this rank does.
        weight_format: what the experts under it are packed in, which the file then says.
        generation_config: written too, if given: where generation with the adapter stops.
        check: called with the folder that holds the complete files, before they are moved into
            place. If it refuses them, they are kept in `refused_adapter` of the folder.

    Raises:
        AdapterCheckError: from `check`, with the folder of the files.
        CheckpointError: likewise, for values that are not finite; or the folder cannot be written.
    """
    names = PeftNames(settings, base_model()) if is_writer else None
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if names is not None and tensor is not None:
            weights.update([names.to_peft(name, tensor)])
    if names is None:
        return
    config = names.build_config(base_model_name)
    try:
        with staged_folder(Path(output_dir), last=ADAPTER_CONFIG_NAME) as folder:
            with DiskErrorsAsOSErrors():
                save_file(weights, folder / ADAPTER_WEIGHTS_NAME, build_metadata(weight_format))
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


class PeftNames:
    """Know under which names and in which form PEFT stores the adapters of a model.

    Args:
        settings: of the adapters.
        model: as transformers builds it, on meta or not.
    """

    def __init__(self, settings: LoraSettings, model: PreTrainedModel) -> None:
        self._settings, self._model = settings, model
        self._places: dict[str, ExpertPlace] = {}
        self._wrappers: dict[str, str] = {}
        if settings.expert_ranks:
            self._places = find_expert_places(model)
            targets = attach_on_meta(build_peft_config(settings, model), model)
            self._wrappers = {name: target.key for name, target in targets.items()}

    def build_config(self, base_model_name: str) -> LoraConfig:
        """Return what `adapter_config.json` holds."""
        config = build_peft_config(self._settings, self._model, base_model_name)
        config.inference_mode = True
        return config

    def to_peft(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """Return the name and the form in which PEFT stores an adapter parameter.

        Args:
            name: in the model, `...q_proj.lora_A.default.weight` or
                `...mlp.experts.gate_up_proj_lora.lora_A`.
            tensor: whole.
        """
        if match := _LINEAR.fullmatch(name):
            return linear_key(match["layer"], match["side"]), tensor
        match = _EXPERT.fullmatch(name)
        if match is None or match["parameter"] not in self._wrappers:
            raise CheckpointError(f"{name} is not a parameter of an adapter")
        side, packed = self._places[match["parameter"]].pack(match["side"], tensor)
        return linear_key(self._wrappers[match["parameter"]], side), packed
