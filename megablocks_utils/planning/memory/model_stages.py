"""Put the stages of a model together: its decoder layers, and what is outside of them."""

from dataclasses import dataclass, replace

from megablocks_utils.planning.memory.dense_stages import (
    attention_stages,
    mlp_stage,
    norm_stage,
    router_stage,
)
from megablocks_utils.planning.memory.expert_stages import expert_stages
from megablocks_utils.planning.memory.fsdp_units import LayerUnits, ModelUnits
from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import Stage
from megablocks_utils.planning.model.parameter_shapes import LayerShape

__all__ = ["HeadPlan", "LayerPlan", "plan_head", "plan_layers"]


@dataclass(frozen=True)
class LayerPlan:
    """A decoder layer.

    Attributes:
        units: its parameters.
        dense: stages up to the router, or all of a layer without experts.
        experts: stages of the experts.
        shared: stages of experts that every token passes, after them.
    """

    units: LayerUnits
    dense: tuple[Stage, ...]
    experts: tuple[Stage, ...]
    shared: tuple[Stage, ...]


@dataclass(frozen=True)
class HeadPlan:
    """Bytes of what is not in a layer.

    Attributes:
        held: as long as a micro-step lasts: token numbers, rotary angles.
        mask: of all tokens of a row; checkpointing keeps it for backward.
        norm: the final norm.
        rows: hidden states of the positions with labels.
        own_rows: how many of these this rank takes; no other rank of its tp group does.
        own_rows_bytes: their hidden states.
        saved_rows: of these, what the output head keeps for its weights' gradient.
        gathered: the head's weights, put together where a tp group splits them.
        logits: in the dtype of compute.
        logits_fp32: in fp32.
        gradient: of the output head's weights, and likewise of the embedding's; 0 if frozen.
    """

    held: int
    mask: int
    norm: Stage
    rows: int
    own_rows: int
    own_rows_bytes: int
    saved_rows: int
    gathered: int
    logits: int
    logits_fp32: int
    gradient: int


def plan_layers(sizes: Sizes, units: ModelUnits) -> list[LayerPlan]:
    """Return the plan of every layer; layers of one kind share it."""
    plans = {
        id(layer): _plan_layer(sizes, layer, layer_units)
        for layer, layer_units in zip(sizes.shape.layers, units.layers, strict=True)
    }
    first, *others = (plans[id(layer)] for layer in sizes.shape.layers)
    if sizes.first_inputs_are_frozen:
        # Before the first adapter of all, nothing is kept and there is no way back.
        count = len(first.dense) if sizes.first_experts_send_nothing_back else 1
        frozen = (replace(stage, saved={}, backward={}) for stage in first.dense[:count])
        first = replace(first, dense=(*frozen, *first.dense[count:]))
    return [first, *others]


def _plan_layer(sizes: Sizes, layer: LayerShape, units: LayerUnits) -> LayerPlan:
    keeps_input = sizes.run.gradient_checkpointing != "none"
    dense = [
        norm_stage(sizes, "norm before attention", owns_input=not keeps_input),
        *attention_stages(sizes),
        norm_stage(sizes, "norm before experts", owns_input=True),
    ]
    if not layer.is_moe:
        dense.append(
            mlp_stage(sizes, "dense MLP", layer.mlp_size // sizes.run.tp_size, owns_input=True)
        )
        return LayerPlan(units, tuple(dense), (), ())
    dense.append(router_stage(sizes))
    shared = []
    if layer.mlp_size:
        shared.append(
            mlp_stage(
                sizes, "shared experts", layer.mlp_size // sizes.run.tp_size, owns_input=False
            )
        )
    experts = expert_stages(sizes, units.experts or units.layer)
    return LayerPlan(units, tuple(dense), tuple(experts), tuple(shared))


def plan_head(sizes: Sizes) -> HeadPlan:
    """Return the sizes of a run."""
    shape, run = sizes.shape, sizes.run
    logits = run.label_tokens * shape.vocab_size
    rows = run.label_tokens * shape.hidden_size * sizes.compute
    own_rows = -(-run.label_tokens // run.tp_size)
    own_rows_bytes = own_rows * shape.hidden_size * sizes.compute
    weights = shape.vocab_size * shape.hidden_size * sizes.compute
    angles = 2 * sizes.tokens * sizes.attention.rope_dim * sizes.compute
    return HeadPlan(
        held=angles + 3 * sizes.tokens * INDEX,
        mask=sizes.mask_elements,  # of one byte each
        norm=norm_stage(sizes, "final norm", owns_input=True),
        rows=rows,
        own_rows=own_rows,
        own_rows_bytes=own_rows_bytes,
        saved_rows=own_rows_bytes * sizes.trains_all,
        gathered=weights * (run.tp_size > 1),
        logits=logits * sizes.compute,
        logits_fp32=logits * FP32,
        gradient=weights // run.tp_size * sizes.trains_all,
    )
