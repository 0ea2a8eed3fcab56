"""Weights that an adapter file holds whole, and that replace the model's.

Those of `modules_to_save` and of all modules inside them, buffers too; biases that were trained;
and embeddings, which PEFT stores where they have been resized or have adapters.
"""

from collections.abc import Mapping
from itertools import accumulate

from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_config import AdapterConfigFile
from megablocks_utils.lora.peft_format import PREFIX
from megablocks_utils.moe.expert_spec import find_expert_parameters

__all__ = ["find_replaced"]


def find_replaced(
    config: AdapterConfigFile, index: CheckpointIndex, model: PreTrainedModel
) -> Mapping[str, str]:
    """Return the tensors of a file that replace parameters and buffers of the model, by these.

    Raises:
        CheckpointError: one of `modules_to_save` is missing in the file, has another shape, or is
            tied to another weight.
    """
    path = index.folder / ADAPTER_WEIGHTS_NAME
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if module in ends}
    of_experts, replaced = find_expert_parameters(model), {}
    for name, weight in model.state_dict().items():
        key = _find_key(name, config, index, is_embedding=name in embeddings)
        if key is None:
            continue
        if name in of_experts:
            raise CheckpointError(
                f"{config.path} has modules_to_save {', '.join(config.modules_to_save)}, which"
                f" covers {name}: whole experts are not read from an adapter"
            )
        if key not in index:
            raise CheckpointError(
                f"{path} has no {key}, though {config.path.name} has"
                f" modules_to_save {', '.join(config.modules_to_save)}"
            )
        if index.shape(key) != tuple(weight.shape):
            raise CheckpointError(
                f"{key} in {path} has shape {index.shape(key)}, wanted is"
                f" {tuple(weight.shape)} by the model's sizes"
            )
        if not index.dtype(key).is_floating_point:
            raise CheckpointError(
                f"{key} in {path} has dtype {index.dtype(key)}, wanted is one of floating point"
            )
        replaced[name] = key
    ties = model.all_tied_weights_keys
    tied = {*ties, *ties.values()} & set(replaced)
    if tied:
        raise CheckpointError(
            f"{path} replaces {min(tied)}, which is tied to another weight in this model"
        )
    return replaced


def _find_key(
    name: str, config: AdapterConfigFile, index: CheckpointIndex, *, is_embedding: bool
) -> str | None:
    """Return the tensor that replaces a parameter or buffer; None for one that stays."""
    *modules, last = name.split(".")
    module = ".".join(modules)
    around = list(accumulate(modules, "{}.{}".format))
    # PEFT's own rule, of modules with all that is in them.
    if any(outer.endswith(saved) for outer in around for saved in config.modules_to_save):
        return f"{PREFIX}{name}"
    if is_embedding or (config.has_biases and last == "bias"):
        keys = (f"{PREFIX}{module}.base_layer.{last}", f"{PREFIX}{name}")
        return next((key for key in keys if key in index), None)
    return None
