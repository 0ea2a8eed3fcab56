"""What adapters a run has: which modules, which ranks, which scaling; and the same for PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig
from torch import nn

from megablocks_utils.lora.linear_choice import has_end, target_ends
from megablocks_utils.moe.expert_spec import find_expert_modules, read_parameter_names

__all__ = ["LoraSettings", "build_peft_config", "same_rank_everywhere"]


@dataclass(frozen=True)
class LoraSettings:
    """Describe the adapters of a model; every one adds `scaling * B @ A` to its weight.

    Attributes:
        r: rank of the adapters of linear layers.
        lora_alpha: strength, over `r`.
        target_modules: ends of the names of the linear layers with adapters; may be empty.
        expert_ranks: projection of the experts -> rank; empty where experts have no adapters. A
            rank other than `r` comes from adapters of the separate gate and up of transformers 4.
        target_weights: ends of the names of linear layers that PEFT finds by their weight alone:
            it takes their last names for those of single experts.
        router_weights: ends of the names of routers of classes of their own, found so, too.
        dropout: share of an adapter's inputs that training drops.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] = ()
    expert_ranks: Mapping[str, int] = field(default_factory=dict)
    target_weights: tuple[str, ...] = ()
    router_weights: tuple[str, ...] = ()
    dropout: float = 0.0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the settings that the manifest of a checkpoint holds; dropout changes no file."""
        return cls(
            record["r"],
            record["lora_alpha"],
            tuple(record["target_modules"]),
            record["expert_ranks"],
            tuple(record.get("target_weights", ())),
            tuple(record.get("router_weights", ())),
        )

    @property
    def scaling(self) -> float:
        """Factor of every adapter, those of experts with other ranks too."""
        return self.lora_alpha / self.r

    @property
    def linear_ends(self) -> tuple[str, ...]:
        """Ends of the names of all linear layers with adapters."""
        return (*self.target_modules, *self.target_weights)

    @property
    def all_ends(self) -> tuple[str, ...]:
        """Ends of the names of all modules with adapters but experts."""
        return (*self.linear_ends, *self.router_weights)

    def describe(self) -> str:
        """Say which modules have adapters, and how strong they are."""
        experts = [f"experts.{projection}" for projection in self.expert_ranks]
        ends = (*self.linear_ends, *self.router_weights, *experts)
        names = ", ".join(dict.fromkeys(map(_path_in_layer, ends)))
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"LoRA of rank {self.r}, alpha {self.lora_alpha:g}{dropout}, on {names}"


def same_rank_everywhere(r: int, model: nn.Module) -> Mapping[str, int]:
    """Return `expert_ranks` for adapters of rank `r` on all projections of a model's experts."""
    modules = find_expert_modules(model).values()
    return dict.fromkeys((name for m in modules for name in read_parameter_names(m)[:2]), r)


def build_peft_config(
    settings: LoraSettings, model: nn.Module, base_model_name: str | None = None
) -> LoraConfig:
    """Translate the settings for PEFT, as `adapter_config.json` holds them.

    Args:
        settings: of the adapters.
        model: whose they are, with transformers' experts or ours.
        base_model_name: what PEFT will load the adapter onto.
    """
    ranks = _rank_of_targets(settings, model)
    patterns = {target: rank for target, rank in ranks.items() if rank != settings.r}
    by_weight = (*settings.target_weights, *settings.router_weights)
    parameters = [*ranks, *(f"{end}.weight" for end in by_weight)]
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever it is
        # PEFT drops nothing of parameters' adapters, and refuses a file that says so.
        lora_dropout=0.0 if parameters else settings.dropout,
        target_modules=list(settings.target_modules),
        target_parameters=parameters or None,
        rank_pattern=patterns,
        alpha_pattern={name: rank * settings.scaling for name, rank in patterns.items()},
    )


def _rank_of_targets(settings: LoraSettings, model: nn.Module) -> dict[str, int]:
    """Return the ends of names by which PEFT finds the experts' projections, each with its rank."""
    modules = find_expert_modules(model) if settings.expert_ranks else {}
    blocks = {_path_in_layer(name) for name in modules}
    names = [name for name, _ in model.named_parameters()]
    ranks: dict[str, int] = {}
    for projection, rank in settings.expert_ranks.items():
        chosen = {f"{name}.{projection}" for name in modules}
        wanted = [f"{block}.{projection}" for block in sorted(blocks)]
        exact = target_ends(model, chosen, names)
        if set(exact) == chosen or any(has_end(n, wanted) for n in names if n not in chosen):
            wanted = list(exact)
        ranks |= dict.fromkeys(wanted, rank)
    return ranks


def _path_in_layer(name: str) -> str:
    """Return what follows the last number in a module's name: `mlp.experts`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
