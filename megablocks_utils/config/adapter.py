"""Which modules get low-rank adapters. Torch-free."""

from dataclasses import dataclass
from typing import Annotated

from megablocks_utils.config.option import Option
from megablocks_utils.config.quantization import NO_QUANTIZATION, QUANTIZATIONS

__all__ = ["DEFAULT_LORA_ALPHA", "DEFAULT_LORA_R", "EXPERT_MODE_OF", "AdapterConfig"]

DEFAULT_LORA_R = DEFAULT_LORA_ALPHA = 16
EXPERT_MODE_OF = {"none": "full", "attn-only": "frozen", "mlp-only": "lora", "all": "lora"}
"""Which expert parameters are trained: all ("full"), none or adapters, by `use_lora`."""


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

    @property
    def packed_format(self) -> str | None:
        """The format that experts are packed in; None where they are not."""
        return None if self.expert_quantization == NO_QUANTIZATION else self.expert_quantization

    @property
    def has_lora(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.use_lora != "none"

    @property
    def trains_attention(self) -> bool:
        """Whether the attention's linear layers have adapters."""
        return self.use_lora in ("attn-only", "all")

    @property
    def trains_experts(self) -> bool:
        """Whether the experts have adapters."""
        return self.expert_mode == "lora"

    @property
    def expert_mode(self) -> str:
        """Which expert parameters are trained: "full", "frozen" or "lora"."""
        return EXPERT_MODE_OF[self.use_lora]
