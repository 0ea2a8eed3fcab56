"""Choose the linear layers of a model that get adapters: by what modules do, not by their names."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.model_facts import text_config

__all__ = ["find_dense_linears", "find_mixer_linears", "has_end", "is_linear", "read_past"]
__all__ += ["list_weights", "target_ends"]

# What only a module that mixes tokens is given: which ones may see each other, or what it kept.
_MIXER_ARGUMENTS = {"attention_mask", "past_key_values", "cache_params"}
_WEIGHT_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))")


def find_mixer_linears(model: nn.Module) -> list[str]:
    """Find the linear layers of the token mixers: attention of any kind, Mamba, convolutions.

    Left out are those whose adapters would do nothing or something else: their module reads the
    weight past the layer, is without gradients or returns positions, or their class is another.
    """
    found = [
        f"{name}.{inner}"
        for layer_name, layer in _decoder_layers(model)
        for name, mixer in _token_mixers(layer_name, layer)
        for inner in _linears_with_effect(mixer)
    ]
    return list(dict.fromkeys(found))


def find_dense_linears(model: nn.Module) -> list[str]:
    """Find the linear layers of dense MLPs and shared experts.

    They are in modules that lead from the hidden size back to it: routers and gates do not. Those
    directly in a decoder layer or beside its experts scale or project, and are left out.
    """
    hidden_size = text_config(model).hidden_size
    experts = find_expert_modules(model)
    blocks = {name.rpartition(".")[0] for name in experts}
    found = []
    for layer_name, layer in _decoder_layers(model):
        mixers = [name for name, _ in _token_mixers(layer_name, layer)]
        for name, module in layer.named_modules(prefix=layer_name):
            if name in {layer_name, *blocks} or _is_inside(name, (*mixers, *experts)):
                continue
            linears = {key: part for key, part in module.named_children() if is_linear(part)}
            if _leads_back(linears.values(), hidden_size) and not _is_gate(name, model):
                found += [f"{name}.{key}" for key in linears]
    return found


def target_ends(model: nn.Module, chosen: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest ends of names, in whole parts, that the chosen ones have and no other.

    In a model that can also see or hear they are whole names: its other parts, which may not be
    built here, can have layers of the same names.

    Args:
        model: whose names they are.
        chosen: some of `names`.
        names: all of its modules or parameters.
    """
    chosen = set(chosen)
    config = getattr(model, "config", None)
    if config is not None and text_config(config) is not config:
        return tuple(sorted(chosen))
    taken = {end for name in names if name not in chosen for end in _ends(name)}
    return tuple(sorted({next(e for e in _ends(name) if e not in taken) for name in chosen}))


def has_end(name: str, ends: Iterable[str]) -> bool:
    """Return whether a name is one of `ends` or ends with one, in whole parts."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def list_weights(model: nn.Module) -> list[str]:
    """Return the names of the modules that have a weight."""
    named = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return [name.removesuffix(".weight") for name in named if name.endswith(".weight")]


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])


def _decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of each list of the text model that has experts: name and module."""
    text = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    prefix = next((name for name, module in model.named_modules() if module is text), "")
    names = [name for name in find_expert_modules(model) if name.startswith(prefix)]
    stems = {re.split(r"\.\d+(?:\.|$)", name)[0] for name in names}
    for stem in sorted(stems):
        layers = model.get_submodule(stem)
        if isinstance(layers, nn.ModuleList):
            yield from ((f"{stem}.{key}", layer) for key, layer in layers.named_children())


def _token_mixers(layer_name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules of a layer that mix tokens."""
    seen: list[str] = []
    for name, module in layer.named_modules(prefix=layer_name):
        if name == layer_name or _is_inside(name, seen):
            continue
        if _MIXER_ARGUMENTS & inspect.signature(type(module).forward).parameters.keys():
            seen.append(name)
            yield name, module


def _linears_with_effect(mixer: nn.Module) -> Iterator[str]:
    without: list[str] = []
    for name, module in mixer.named_modules():
        if _is_inside(name, without):
            continue
        if name and _only_selects(module):
            without.append(name)
            continue
        bypassed = read_past(module)
        for key, part in module.named_children():
            if is_linear(part) and key not in bypassed:
                yield f"{name}.{key}".lstrip(".")


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer that computes what `nn.Linear` does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _only_selects(module: nn.Module) -> bool:
    """Say whether a module within a mixer returns what it has selected, without a gradient.

    Its positions, or a mask of them: some say it, and the others take the top ones.
    """
    forward = type(module).forward
    source = _source(forward)
    annotation = str(inspect.signature(forward).return_annotation)
    return "LongTensor" in annotation or "@torch.no_grad()" in source or ".topk(" in source


def read_past(module: nn.Module) -> set[str]:
    """Return the children whose weight the module computes with itself, past their forward.

    A fused operation does it, on a GPU perhaps only: the adapter around the layer is not asked.
    """
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = [method for cls in classes for method in vars(cls).values()]
    uses = (_WEIGHT_READ.findall(_source(method)) for method in methods if callable(method))
    return {name for names in uses for name in names}


@cache
def _source(function: Callable[..., object]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made at run time, or built in
        return ""


def _leads_back(linears: Iterable[nn.Module], hidden_size: int) -> bool:
    pairs = [(part.in_features, part.out_features) for part in linears if is_linear(part)]
    takes = [pair for pair in pairs if pair[0] == hidden_size]
    gives = [pair for pair in pairs if pair[1] == hidden_size]
    return bool(takes and gives) and len(pairs) > 1


def _is_gate(name: str, model: nn.Module) -> bool:
    """Say whether what a module returns only scales: the module around it takes its sigmoid."""
    path, _, attribute = name.rpartition(".")
    source = _source(type(model.get_submodule(path)).forward)
    return re.search(rf"sigmoid\(\s*self\.{re.escape(attribute)}\(", source) is not None


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
