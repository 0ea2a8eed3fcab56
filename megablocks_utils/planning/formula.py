"""Predict memory and traffic of a run from the model's sizes alone."""

from megablocks_utils.planning.model_shape import ModelShape
from megablocks_utils.planning.prediction import COLLECTIVES, Layout, PlannedRun, Prediction

__all__ = ["legal_layouts", "predict"]

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def legal_layouts(shape: ModelShape, world_size: int, entry_point: str) -> list[Layout]:
    """List every way to spread the experts of a model over the ranks.

    Without expert parallelism first; then each ep_size above 1 that divides ranks and experts,
    sharded over dp before copied. FSDP1 leaves the experts alone, so there they can only be copied.
    """
    layouts = [Layout(1, "shard")]
    for ep_size in range(2, world_size + 1):
        if world_size % ep_size or shape.num_experts % ep_size:
            continue
        if entry_point == "fsdp2":
            layouts.append(Layout(ep_size, "shard"))
        if entry_point == "fsdp1" or ep_size < world_size:
            layouts.append(Layout(ep_size, "replicate"))
    return layouts


def predict(shape: ModelShape, layout: Layout, run: PlannedRun) -> Prediction:
    """Predict what one rank will hold and send; a first, rough version."""
    ratio = run.world_size if layout.expert_dp == "shard" else layout.ep_size
    experts = shape.num_expert_parameters // ratio
    dense = (shape.num_parameters - shape.num_expert_parameters) // run.world_size
    precision = run.precision
    weights, compute = _ITEMSIZE[precision.weights], _ITEMSIZE[precision.compute]
    is_full = run.use_lora == "none"
    trained = dense + experts if is_full else 0
    unit = 4 * compute * shape.layers[-1].numel // (1 if layout.ep_size == 1 else shape.num_experts)
    components = {
        "parameters": (dense + experts) * weights,
        "gradients": trained * weights,
        "optimizer": trained * 2 * _ITEMSIZE[precision.optim],
        "fsdp_buffers": unit,
        "activations": run.tokens * shape.hidden_size * compute * shape.num_layers,
        "dispatch_buffers": run.tokens * shape.top_k * 4 * shape.hidden_size * compute,
    }
    sent = dict.fromkeys(COLLECTIVES, 0)
    return Prediction(components, "backward", components["parameters"], sent)
