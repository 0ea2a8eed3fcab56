"""What a step holds outside of the decoder layers: positions, masks, logits and the loss."""

from dataclasses import dataclass

from megablocks_utils.planning.memory.dense_stages import norm_stage
from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import Stage

__all__ = ["HeadPlan", "plan_head"]


@dataclass(frozen=True)
class HeadPlan:
    """Bytes of what is not in a layer.

    Attributes:
        held: as long as a micro-step lasts: token numbers, rotary angles.
        mask: of all tokens of a row; checkpointing keeps it for backward.
        norm: the final norm.
        rows: hidden states of the positions with labels.
        saved_rows: of these, what the output head keeps for its weights' gradient.
        logits: in the dtype of compute.
        logits_fp32: in fp32.
        gradient: of the output head's weights, and likewise of the embedding's; 0 if frozen.
    """

    held: int
    mask: int
    norm: Stage
    rows: int
    saved_rows: int
    logits: int
    logits_fp32: int
    gradient: int


def plan_head(sizes: Sizes) -> HeadPlan:
    """Return the sizes of a run."""
    shape, run = sizes.shape, sizes.run
    logits = run.label_tokens * shape.vocab_size
    rows = run.label_tokens * shape.hidden_size * sizes.compute
    gradient = shape.vocab_size * shape.hidden_size * sizes.compute * sizes.trains_all
    angles = 2 * sizes.tokens * shape.attention.rope_dim * sizes.compute
    return HeadPlan(
        held=angles + 3 * sizes.tokens * INDEX,
        mask=sizes.tokens**2 * sizes.has_mask,  # of one byte each
        norm=norm_stage(sizes, "final norm", owns_input=True),
        rows=rows,
        saved_rows=rows * sizes.trains_all,
        logits=logits * sizes.compute,
        logits_fp32=logits * FP32,
        gradient=gradient,
    )
