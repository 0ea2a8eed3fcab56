"""Open an existing PEFT LoRA adapter for a model, and read from disk only what is asked for.

Everything is checked when the adapter is opened, from its configuration and the header of its
weights: the tensors must be exactly those that adapters of this model have, so that nothing in
the file is silently dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import (
    CheckpointIndex,
    open_safetensors_file,
    resolve_checkpoint_folder,
)
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_checks import check_adapter, find_places
from megablocks_utils.lora.adapter_config import read_adapter_config
from megablocks_utils.lora.expert_formats import ExpertFormat, Shape, read_finite
from megablocks_utils.lora.peft_format import linear_key
from megablocks_utils.lora.settings import LoraSettings

__all__ = ["AdapterReader", "open_adapter", "resolve_adapter_folder"]

PICKLED_FILE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterReader:
    """Give access to the adapters of one file by the names that the model's weights have.

    Attributes:
        index: the file's tensors.
        settings: which adapters there are, with which ranks and strength.
        linears: linear layer with an adapter -> shape (out, in) of its weight.
        expert_shapes: parameter of experts with adapters -> its shape (E, out, in).
        expert_format: how the file holds them; None where it holds none.
    """

    index: CheckpointIndex
    settings: LoraSettings
    linears: Mapping[str, Shape]
    expert_shapes: Mapping[str, Shape]
    expert_format: ExpertFormat | None

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Read A (r, in) and B (out, r) of a linear layer, in the file's dtype.

        Args:
            name: one of `linears`, `model.layers.0.self_attn.q_proj`.

        Raises:
            CheckpointError: values that are not finite.
        """
        lora_a, lora_b = (read_finite(self.index, linear_key(name, side)) for side in "AB")
        return lora_a, lora_b

    def experts(self, name: str, experts: range) -> tuple[Tensor, Tensor]:
        """Read A (n, rank, in) and B (n, out, rank) of some experts, in the file's dtype.

        The rank is that of `settings.expert_ranks`. Only these experts are read, except for B in
        PEFT's own format: there the columns of all experts alternate, so B is read whole.

        Args:
            name: one of `expert_shapes`, `model.layers.0.mlp.experts.gate_up_proj`.
            experts: which ones, by global index.

        Raises:
            CheckpointError: values that are not finite.
        """
        if self.expert_format is None:
            raise ValueError(f"the adapter {self.index.folder} has none on {name}")
        return self.expert_format.read(self.index, name, self.expert_shapes[name], experts)


def resolve_adapter_folder(name_or_path: str | Path) -> Path:
    """Return the local folder of an adapter, fetching its two files from the Hub if need be.

    Raises:
        CheckpointError: no such folder, and no such adapter on the Hub or no way to reach it.
    """
    patterns = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
    return resolve_checkpoint_folder(str(name_or_path), kind="adapter", patterns=patterns)


def open_adapter(name_or_path: str | Path, model: PreTrainedModel) -> AdapterReader:
    """Open an adapter and check all of it against a model; no weight is read.

    Both PEFT's own format is read and that of adapters made with transformers 4, where each expert
    had its own linear layers: their gate and up become one adapter of twice the rank, as in PEFT.

    Args:
        name_or_path: local folder or Hub name.
        model: the base model, on meta or not, before anything wraps its layers.

    Raises:
        CheckpointError: a missing or damaged file, more than plain LoRA, or tensors that are not
            exactly those that adapters of this model have.
        ConfigurationError: the model is of a family that is not supported.
    """
    folder = resolve_adapter_folder(name_or_path)
    config = read_adapter_config(folder)
    index = _open_weights(folder)
    places = find_places(model)
    found = check_adapter(config, index, places)
    ranks = {}
    if found.expert_format is not None:
        ranks = {_last_name(name): found.expert_format.rank(name, config) for name in found.experts}
    last_names = {_last_name(name) for name in found.linears}
    settings = LoraSettings(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=tuple(sorted(last_names)),
        expert_ranks=MappingProxyType(ranks),
    )
    return AdapterReader(index, settings, found.linears, found.experts, found.expert_format)


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _open_weights(folder: Path) -> CheckpointIndex:
    path = folder / ADAPTER_WEIGHTS_NAME
    if path.is_file():
        return open_safetensors_file(path)
    is_pickled = (folder / PICKLED_FILE_NAME).is_file()
    found = f": only {PICKLED_FILE_NAME}, which is not read here" if is_pickled else ""
    raise CheckpointError(f"the adapter folder {folder} has no {ADAPTER_WEIGHTS_NAME}{found}")
