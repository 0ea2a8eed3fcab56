"""What adapters a run has: which modules, which ranks, which scaling; and the same for PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import LoraConfig

from megablocks_utils.checkpoint.hub_naming import EXPERTS_PATH
from megablocks_utils.shard_moe_utils import PROJECTIONS


@dataclass(frozen=True)
class LoraSettings:
    """Describe the adapters of a model; every one adds `scaling * B @ A` to its weight.

    Attributes:
        r: rank of the adapters of linear layers.
        lora_alpha: strength, over `r`.
        target_modules: last names of the linear layers with adapters; may be empty.
        expert_ranks: projection of the experts -> rank; empty where experts have no adapters. A
            rank other than `r` comes from adapters of the separate gate and up of transformers 4.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] = ()
    expert_ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Factor of every adapter, those of experts with other ranks too."""
        return self.lora_alpha / self.r


def same_rank_everywhere(r: int) -> Mapping[str, int]:
    """Return `expert_ranks` for adapters of rank `r` on all projections of the experts."""
    return dict.fromkeys(PROJECTIONS, r)


def build_peft_config(settings: LoraSettings, base_model_name: str | None = None) -> LoraConfig:
    """Translate the settings for PEFT: for its own layers and for `adapter_config.json`."""
    patterns = {
        _target(projection): rank
        for projection, rank in settings.expert_ranks.items()
        if rank != settings.r
    }
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever it is
        lora_dropout=0.0,
        target_modules=list(settings.target_modules),
        target_parameters=[_target(projection) for projection in settings.expert_ranks] or None,
        rank_pattern=patterns,
        alpha_pattern={name: rank * settings.scaling for name, rank in patterns.items()},
    )


def _target(projection: str) -> str:
    """Return the end of the name by which PEFT finds this projection in every layer."""
    return f"{EXPERTS_PATH}.{projection}"
