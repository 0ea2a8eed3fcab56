"""Transformers' styles of tensor parallelism, and the layers that they are for."""

from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["BASE_LAYER", "BY_COLUMNS", "BY_ROWS", "BY_TOKEN", "BY_WIDTH", "COLUMNS", "GRADIENT_SUM"]
__all__ += ["LOCAL", "ROWS", "WHOLE_INPUT", "WHOLE_OUTPUT", "Styles", "find_linear", "find_target"]

Styles = dict[str, str]
"""Name of a module or parameter -> name of transformers' style."""

COLUMNS, ROWS, LOCAL = "colwise", "rowwise", "local_params"
GRADIENT_SUM = "replicated_with_grad_allreduce"
WHOLE_OUTPUT = ("colwise_gather_output", "colwise_rep")
WHOLE_INPUT = ("rowwise_split_input", "rowwise_rep")
BY_COLUMNS, BY_ROWS = (COLUMNS, *WHOLE_OUTPUT), (ROWS, *WHOLE_INPUT)
BY_TOKEN, BY_WIDTH = "embedding_rowwise", "embedding_colwise"
BASE_LAYER = "base_layer"


def find_target(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return the module or parameter of that name."""
    owner, _, last = name.rpartition(".")
    target: nn.Module | nn.Parameter = getattr(model.get_submodule(owner), last)
    return target


def find_linear(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter is around, or the module itself."""
    return module.get_submodule(BASE_LAYER) if isinstance(module, LoraLayer) else module
