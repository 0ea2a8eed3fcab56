"""Put the stages of every kind of decoder layer together."""

from dataclasses import dataclass, replace

from megablocks_utils.planning.memory.dense_stages import (
    attention_stages,
    mlp_stage,
    norm_stage,
    router_stage,
)
from megablocks_utils.planning.memory.expert_stages import expert_stages
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit, LayerUnits, ModelUnits
from megablocks_utils.planning.memory.sizes import Sizes
from megablocks_utils.planning.memory.stages import Stage
from megablocks_utils.planning.model.parameter_shapes import LayerShape

__all__ = ["LayerPlan", "plan_layers"]


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

    @property
    def expert_unit(self) -> FsdpUnit | None:
        """The experts' own unit; None where the layer's has them."""
        return self.units.experts


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
        dense.append(mlp_stage(sizes, "dense MLP", layer.mlp_size, owns_input=True))
        return LayerPlan(units, tuple(dense), (), ())
    dense.append(router_stage(sizes))
    shared = []
    if layer.mlp_size:
        shared.append(mlp_stage(sizes, "shared experts", layer.mlp_size, owns_input=False))
    experts = expert_stages(sizes, units.experts or units.layer)
    return LayerPlan(units, tuple(dense), tuple(experts), tuple(shared))
