"""How the experts of a model will be used: what the choice of a backend depends on besides them."""

from dataclasses import dataclass

import torch

from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.shapes import EXPERT_MODES, ExpertShapes
from megablocks_utils.moe.expert_spec import ExpertSpec

__all__ = ["ExpertUse"]


@dataclass(frozen=True)
class ExpertUse:
    """What the caller of `shard_moe` knows of how its experts will be used.

    Attributes:
        device_type: `cpu` or `cuda`.
        compute_dtype: None takes that of the weights.
        mode: which of their parameters are trained, one of `EXPERT_MODES`.
        tokens_per_rank: about how many tokens a rank has at a time, or None.
        weight_format: what the projections are packed in; None: they are not.
    """

    device_type: str
    compute_dtype: torch.dtype | None
    mode: str
    tokens_per_rank: int | None
    weight_format: str | None = None

    def shapes(
        self,
        spec: ExpertSpec,
        dtype: torch.dtype,
        top_k: int | None,
        ep_size: int,
        expert_tp_size: int = 1,
    ) -> ExpertShapes:
        """Return what the choice of a backend depends on.

        Args:
            spec: the experts of one layer, whole.
            dtype: of their weights.
            top_k: experts of a token, or None.
            ep_size: ranks they are split over.
            expert_tp_size: ranks that each is split over.

        Raises:
            ConfigurationError: a mode that does not exist.
        """
        if self.mode not in EXPERT_MODES:
            wanted = join_words(EXPERT_MODES)
            raise ConfigurationError(
                f"expert_mode is {self.mode}, but it must be {wanted}.", parameters=("expert_mode",)
            )
        tokens = self.tokens_per_rank
        return ExpertShapes(
            spec.hidden_size,
            spec.intermediate_size // expert_tp_size,
            self.compute_dtype or dtype,
            self.device_type,
            mode=self.mode,
            gate=spec.gate,
            num_local_experts=spec.num_experts // ep_size,
            # Rows of other ranks come one by one.
            top_k=top_k if ep_size * expert_tp_size == 1 else 1,
            num_rows=None if tokens is None or top_k is None else tokens * top_k,
            has_gate=spec.has_gate,
            has_bias=spec.has_bias,
            is_transposed=spec.is_transposed,
            is_interleaved=spec.is_interleaved,
            weight_format=self.weight_format,
        )
