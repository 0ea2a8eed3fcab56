"""A run whose layers are compiled in part equals one process of stock transformers."""

import torch

from megablocks_utils.training.step import compiled_parts
from tests.support.parity import TWO_BATCHES, Layout, ParityCase, run_case, train_fsdp2
from tests.support.trace import Trace, measure_distance

BOUND = 1e-5
# With adapters, frozen weights, views that FSDP makes, recomputation and gradients that wait.
CASE = ParityCase(
    Layout(1, 1),
    "mixtral, one layer",
    num_steps=2,
    num_examples=TWO_BATCHES,
    accumulation=2,
    checkpointing="selective",
    lora="attn-only",
)


def train_compiled(rank: int, argv: list[str]) -> Trace:
    """Run FSDP2's path with graphs that run eager: no code is generated, which takes minutes."""
    names = "MixtralAttention", "MixtralRMSNorm", "MixtralTopKRouter"
    backend, compiled_parts.BACKEND = compiled_parts.BACKEND, "eager"
    codes: dict[str, compiled_parts.PartCode] = {}
    run = compiled_parts.PartCode.__call__

    def note(code: compiled_parts.PartCode, *args: object, **kwargs: object) -> object:
        codes[code.kind.__name__] = code
        return run(code, *args, **kwargs)

    compiled_parts.PartCode.__call__ = note
    try:
        trace = train_fsdp2(rank, [*argv, "--compile", "True"])
    finally:
        compiled_parts.BACKEND, compiled_parts.PartCode.__call__ = backend, run
        torch._dynamo.reset()
    assert all(not codes[name].reason and codes[name].num_graphs for name in names)
    return trace


def test_run_equals_one_stock_process(pools, parity_folder):
    wanted = parity_folder.reference(parity_folder.stock_run(CASE))
    distance = measure_distance(run_case(pools, parity_folder, CASE, train_compiled), wanted)
    assert max(distance.loss, distance.grad_norm, distance.first_gradient) < BOUND, distance
