"""Open an existing PEFT LoRA adapter for a model, and read from disk only what is asked for.

Everything is checked when the adapter is opened, from its configuration and the header of its
weights: the tensors must be exactly those that adapters of this model have, so that nothing in
the file is silently dropped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import (
    CheckpointIndex,
    open_safetensors_file,
    resolve_checkpoint_folder,
)
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_checks import FoundAdapter, FoundAdapters, check_adapter
from megablocks_utils.lora.adapter_config import AdapterConfigFile, read_adapter_config
from megablocks_utils.lora.expert_formats import read_finite
from megablocks_utils.lora.peft_format import linear_key

__all__ = ["AdapterReader", "find_base_name", "open_adapter", "resolve_adapter_folder"]

PICKLED_FILE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterReader:
    """Give access to the adapters of one file by the names that the model's weights have.

    Attributes:
        config: what its configuration says.
        index: the file's tensors.
        found: which of them are adapters of what.
    """

    config: AdapterConfigFile
    index: CheckpointIndex
    found: FoundAdapters

    @property
    def linears(self) -> Mapping[str, FoundAdapter]:
        """Linear layer -> its adapter."""
        return self.found.linears

    @property
    def expert_parameters(self) -> Mapping[str, FoundAdapter]:
        """Parameter of experts -> its adapters."""
        return self.found.experts

    def replaced(self, name: str) -> Tensor:
        """Read the tensor that replaces a weight, one of `found.replaced`, in its own dtype.

        Raises:
            CheckpointError: values that are not finite.
        """
        return read_finite(self.index, self.found.replaced[name])

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

        The rank is that of `expert_parameters`. Only these experts are read, except for B in
        PEFT's own format: there the columns of all experts alternate, so B is read whole.

        Args:
            name: one of `expert_parameters`, `model.layers.0.mlp.experts.gate_up_proj`.
            experts: which ones, by global index.

        Raises:
            CheckpointError: values that are not finite.
        """
        expert_format = self.found.expert_format
        if expert_format is None:
            raise ValueError(f"the adapter {self.index.folder} has none on {name}")
        return expert_format.read(self.index, name, experts)


def resolve_adapter_folder(name_or_path: str | Path) -> Path:
    """Return the local folder of an adapter, fetching its two files from the Hub if need be.

    Raises:
        CheckpointError: no such folder, and no such adapter on the Hub or no way to reach it.
    """
    patterns = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
    return resolve_checkpoint_folder(str(name_or_path), kind="adapter", patterns=patterns)


def find_base_name(given: str | None, adapter_folder: Path) -> str:
    """Return the base model that is given, or else the one that an adapter's configuration names.

    Raises:
        ConfigurationError: neither names one.
    """
    config = read_adapter_config(adapter_folder)
    name = given or config.base_model_name
    if name is None:
        raise ConfigurationError(
            f"model_name_or_path is not given, and {config.path} names no"
            " base_model_name_or_path; give the base model of this adapter.",
            parameters=("model_name_or_path",),
        )
    return name


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
    return AdapterReader(config, index, check_adapter(config, index, model))


def _open_weights(folder: Path) -> CheckpointIndex:
    path = folder / ADAPTER_WEIGHTS_NAME
    if path.is_file():
        return open_safetensors_file(path)
    is_pickled = (folder / PICKLED_FILE_NAME).is_file()
    found = f": only {PICKLED_FILE_NAME}, which is not read here" if is_pickled else ""
    raise CheckpointError(f"the adapter folder {folder} has no {ADAPTER_WEIGHTS_NAME}{found}")
