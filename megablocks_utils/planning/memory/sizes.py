"""Numbers that every stage is made of."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from megablocks_utils.config.dispatch_cost import TokenTraffic, choose_dispatch
from megablocks_utils.dtypes import itemsize
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.parameter_shapes import AttentionShape
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun

__all__ = ["Sizes"]

FP32 = 4
INDEX = 8
"""Bytes of a number of tokens' order."""


@dataclass(frozen=True)
class Sizes:
    """A model, a layout and a run, and what follows from the three."""

    shape: ModelShape
    layout: ParallelLayout
    run: PlannedRun

    @cached_property
    def attention(self) -> AttentionShape:
        """Sizes of the attention, of the heads that this rank has."""
        whole, tp_size = self.shape.attention, self.run.tp_size
        assert whole is not None, "formulas are for models that they know"
        num_heads, num_kv_heads = whole.num_heads // tp_size, whole.num_kv_heads // tp_size
        return replace(whole, num_heads=num_heads, num_kv_heads=num_kv_heads)

    @property
    def compute(self) -> int:
        """Bytes of an element that is computed with."""
        return itemsize(self.run.precision.compute)

    @property
    def casts(self) -> bool:
        """Whether fp32 is another dtype than that of compute."""
        return self.compute != FP32

    @property
    def tokens(self) -> int:
        """T."""
        return self.run.tokens

    def hidden(self, num_bytes: int) -> int:
        """T * H elements."""
        return self.tokens * self.shape.hidden_size * num_bytes

    @property
    def expert_hidden_bytes(self) -> int:
        """Hidden states of the tokens that this rank brings to the experts."""
        return self.run.expert_tokens * self.shape.hidden_size * self.compute

    @property
    def hidden_fp32_bytes(self) -> int:
        """T * H in fp32."""
        return self.hidden(FP32)

    @property
    def hidden_bytes(self) -> int:
        """T * H in the dtype of compute."""
        return self.hidden(self.compute)

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained."""
        return self.run.use_lora == "none"

    @property
    def has_mask(self) -> bool:
        """Whether attention needs a mask: several examples, or a window that ends in a row.

        Without one, and with `varlen`, attention takes fewer keys than queries as they are.
        """
        if self.run.is_varlen:
            return False
        window = self.attention.sliding_window
        return self.run.examples > 1 or (window is not None and window < self.run.row_tokens)

    @property
    def mask_elements(self) -> int:
        """Elements of that mask; 0 without one."""
        return self.tokens * self.run.sp_size * self.run.row_tokens * self.has_mask

    @property
    def key_repeats(self) -> int:
        """Copies of each key head, so that the ranks that share rows can share them evenly."""
        return self.run.sp_size // math.gcd(self.run.sp_size, self.attention.num_kv_heads)

    @property
    def first_inputs_are_frozen(self) -> bool:
        """Whether the embedding's output asks for no gradient.

        With checkpointing, transformers has it ask for one.
        """
        return not self.trains_all and self.run.gradient_checkpointing == "none"

    @property
    def first_experts_send_nothing_back(self) -> bool:
        """Whether nothing before the first layer's experts is trained either."""
        return self.first_inputs_are_frozen and not self.run.trains_attention

    @property
    def has_own_experts(self) -> bool:
        """Whether the experts are this project's, not transformers'."""
        return self.run.has_own_experts(self.layout)

    @property
    def expert_size(self) -> int:
        """I of the slice of an expert that this rank computes with."""
        return self.shape.expert_size // self.run.expert_tp_size

    @property
    def rows_travel(self) -> bool:
        """Whether other ranks have experts, or slices of them, that rows go to."""
        return self.layout.ep_size > 1 or self.run.expert_tp_size > 1

    @property
    def num_local(self) -> int:
        """L, experts that this rank computes with."""
        return self.shape.num_experts // self.layout.ep_size

    @property
    def num_routed(self) -> int:
        """N."""
        return self.run.expert_tokens * self.shape.top_k

    @property
    def num_brought(self) -> int:
        """M, that come over the ep axis to the rank that receives most."""
        if self.layout.ep_size == 1:
            return self.num_routed
        return math.ceil(self.num_routed * self.run.imbalance)

    @property
    def num_received(self) -> int:
        """R, that this rank computes: M of each rank with a slice of its experts."""
        return self.num_brought * self.run.expert_tp_size

    @cached_property
    def sends_tokens(self) -> bool:
        """Whether a token travels once to a rank, not once for each of its experts there."""
        if self.layout.ep_size == 1 or self.run.expert_tp_size > 1:
            return False
        return choose_dispatch(self.run.token_dispatch, self._traffic, None).is_once_per_rank

    @property
    def num_sent(self) -> int:
        """Rows, or copies of tokens, that a rank sends, itself among the receivers."""
        return (
            self._traffic.count_copies(self.run.expert_tokens)
            if self.sends_tokens
            else self.num_routed
        )

    @property
    def num_came(self) -> int:
        """Rows, or tokens, that come over the ep axis to the rank that receives most."""
        if not self.sends_tokens:
            return self.num_brought
        return math.ceil(self.num_sent * self.run.imbalance)

    @property
    def _traffic(self) -> TokenTraffic:
        shape, hidden_bytes = self.shape, self.shape.hidden_size * self.compute
        return TokenTraffic(shape.num_experts, shape.top_k, self.layout.ep_size, hidden_bytes)

    def routed(self, width: int) -> int:
        """N rows in the dtype of compute."""
        return self.num_routed * width * self.compute

    def received(self, width: int) -> int:
        """R rows in the dtype of compute."""
        return self.num_received * width * self.compute
