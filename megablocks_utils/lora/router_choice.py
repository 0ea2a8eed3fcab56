"""Find the routers and the head that get adapters: by what modules hold, not by their names."""

import re

from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.lora.linear_choice import is_linear, read_past
from megablocks_utils.lora.peft_format import find_expert_places

__all__ = ["find_head", "find_router_modules"]


def find_router_modules(model: nn.Module) -> list[str]:
    """Find the modules beside experts whose weight has a row for each expert.

    They are linear layers or routers of a class of their own, which PEFT reaches by their weight.
    Left out is a module past whose forward the weight is read: its adapter would do nothing.
    """
    found = []
    for name, place in find_expert_places(model).items():
        experts = name.rpartition(".")[0]
        block, _, attribute = experts.rpartition(".")
        counts = {place.shape[0], place.num_stored}
        bypassed = read_past(model.get_submodule(block))
        for inner, module in model.get_submodule(block).named_modules():
            weight = getattr(module, "weight", None)
            if re.match(rf"{re.escape(attribute)}(\.|$)", inner) or inner in ("", *bypassed):
                continue
            if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding):
                continue
            if weight.dim() == 2 and len(weight) in counts:
                found.append(f"{block}.{inner}")
    return list(dict.fromkeys(found))


def find_head(model: PreTrainedModel) -> str | None:
    """Return the name of the output head; None where it is tied or no plain linear layer."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None or f"{name}.weight" in model.all_tied_weights_keys:
        return None
    return name if is_linear(head) else None
