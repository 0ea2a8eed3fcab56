"""Which modules get low-rank adapters. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from megablocks_utils.config.option import Option
from megablocks_utils.config.quantization import NO_QUANTIZATION, QUANTIZATIONS, find_format

__all__ = ["ATTENTION", "DEFAULT_LORA_ALPHA", "DEFAULT_LORA_R", "EXPERTS", "EXPERT_MODE_OF"]
__all__ += [
    "LM_HEAD",
    "NO_LORA",
    "ROUTER",
    "SHARED",
    "AdapterConfig",
    "name_targets",
    "parts_of",
    "targets_of",
]

DEFAULT_LORA_R = DEFAULT_LORA_ALPHA = 16
EXPERT_MODE_OF = {"none": "full", "attn-only": "frozen", "mlp-only": "lora", "all": "lora"}
"""Which expert parameters are trained: all ("full"), none or adapters, by `use_lora`."""

NO_LORA = "none"
ATTENTION, EXPERTS, SHARED, ROUTER, LM_HEAD = "attention", "experts", "shared", "router", "lm_head"
_PARTS = (EXPERTS, ATTENTION, SHARED, ROUTER, LM_HEAD)
_PARTS_OF = {
    NO_LORA: (),
    "attn-only": (ATTENTION,),
    "mlp-only": (EXPERTS,),
    "all": (EXPERTS, ATTENTION, SHARED),
}


def parts_of(targets: str) -> tuple[str, ...]:
    """Return the parts of a model that have adapters, by what `name_targets` returns."""
    return _PARTS_OF.get(targets) or tuple(part for part in targets.split(",") if part in _PARTS)


def name_targets(use_lora: str, lora_target: Sequence[str] | None) -> str:
    """Return one word for the parts that have adapters: of `--use_lora` if it has one.

    Args:
        use_lora: as given.
        lora_target: as given; None leaves it to `use_lora`.
    """
    if not lora_target:
        return use_lora
    parts = tuple(part for part in _PARTS if part in lora_target)
    words = {parts: word for word, parts in _PARTS_OF.items()}
    return words.get(parts, ",".join(parts))


def targets_of(values: Mapping[str, Any]) -> str:
    """Return `name_targets` of options' values by name."""
    return name_targets(values["use_lora"], values["lora_target"])


@dataclass(frozen=True)
class AdapterConfig:
    """Say which modules get low-rank adapters; `use_lora` "none" trains all weights.

    Attributes:
        use_lora: "none", "attn-only", "mlp-only" (experts) or "all" (both, shared experts and
            dense MLPs).
        lora_r: Rank; the parsers fill in the default, or leave None for that of `resume_adapter`.
        lora_alpha: Strength over the rank; likewise.
        resume_adapter: PEFT adapter to resume from.
        verify_adapter: "auto", "True" or "False".
        expert_quantization: "none", or the format in which frozen experts are kept.
        lora_target: the parts with adapters one by one; None leaves it to `use_lora`.
        lora_dropout: share of an adapter's inputs that is dropped in training.
    """

    use_lora: Annotated[
        str,
        Option(
            "train low-rank adapters on the attention or whatever mixes tokens (attn-only), on the "
            "experts (mlp-only), or on both, shared experts and dense MLPs (all), everything else "
            "frozen; none trains all weights",
            choices=tuple(EXPERT_MODE_OF),
        ),
    ] = "none"
    lora_r: Annotated[
        int | None,
        Option(
            "rank of the adapters",
            minimum=1,
            limit=2**16,
            shown_default=f"{DEFAULT_LORA_R}, or that of --resume_adapter",
        ),
    ] = None
    lora_alpha: Annotated[
        int | None,
        Option(
            "strength of the adapters: lora_alpha / lora_r",
            minimum=1,
            shown_default=f"{DEFAULT_LORA_ALPHA}, or that of --resume_adapter",
        ),
    ] = None
    resume_adapter: Annotated[
        str | None,
        Option(
            "PEFT adapter to resume from, folder or Hub name: weights, rank and alpha are its own, "
            "the optimizer starts fresh",
            metavar="ADAPTER",
        ),
    ] = None
    verify_adapter: Annotated[
        str,
        Option(
            "after saving, load the adapter with plain PEFT on the plain model in one process and "
            "compare logits; auto: where the model fits in the memory of one process",
            choices=("auto", "True", "False"),
        ),
    ] = "auto"
    expert_quantization: Annotated[
        str,
        Option(
            "with --use_lora, keep the frozen weights of experts in few bits, packed while they "
            "are read and dequantized for use: nf4 (about 0.52 bytes a weight) and mxfp4 (0.53), "
            "fp8 and int8 (1.0)",
            choices=QUANTIZATIONS,
        ),
    ] = NO_QUANTIZATION
    lora_target: Annotated[
        tuple[str, ...] | None,
        Option(
            "instead of --use_lora, the parts that get adapters one by one; shared: shared experts "
            "and dense MLPs",
            choices=_PARTS,
            shown_default="as --use_lora says",
        ),
    ] = None
    lora_dropout: Annotated[
        float,
        Option(
            "share of the inputs of attention's, shared experts' and the head's adapters that "
            "training drops; not of the experts' and routers', whose adapters must have 0",
            minimum=0,
            maximum=0.99,
        ),
    ] = 0.0

    @property
    def packed_format(self) -> str | None:
        """The format that experts are packed in; None where they are not."""
        return find_format(self.expert_quantization)

    @classmethod
    def of_targets(cls, targets: str, **others: Any) -> Self:
        """Return the configuration for what `targets` names, and `others` of its fields."""
        if targets in _PARTS_OF:
            return cls(use_lora=targets, **others)
        return cls(lora_target=parts_of(targets), **others)

    @property
    def targets(self) -> str:
        """Which parts have adapters, in one word; `parts_of` takes it apart."""
        return name_targets(self.use_lora, self.lora_target)

    @property
    def parts(self) -> tuple[str, ...]:
        """Which parts have adapters."""
        return parts_of(self.targets)

    @property
    def option(self) -> str:
        """The option that says which parts have adapters."""
        return "use_lora" if self.lora_target is None else "lora_target"

    @property
    def named(self) -> str:
        """What that option is."""
        return self.use_lora if self.lora_target is None else ",".join(self.lora_target)

    @property
    def has_lora(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.targets != NO_LORA

    @property
    def trains_experts(self) -> bool:
        """Whether the experts have adapters."""
        return EXPERTS in self.parts

    @property
    def expert_mode(self) -> str:
        """Which expert parameters are trained: "full", "frozen" or "lora"."""
        if not self.has_lora:
            return "full"
        return "lora" if self.trains_experts else "frozen"
