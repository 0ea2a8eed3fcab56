"""Models whose tokens are mixed by attention alone, and only these, can share rows."""

import pytest
import torch
from rich.console import Console

from megablocks_utils.config import OptimConfig, ParallelConfig, RunConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.step.sequence_parallel import (
    apply_sequence_parallelism,
    measure_parts,
)
from tests.support.tiny_families import build_tiny

CPU = torch.device("cpu")
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 8,
    "short_mscale": 1.0,
    "long_mscale": 1.1,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [("mixtral", {}), ("phimoe", {"rope_parameters": LONG_ROPE}), ("deepseek_v3", {})],
)
def test_attention_alone_mixes_tokens(family, options):
    assert measure_parts(build_tiny(family, **options), Packing.POSITIONS, CPU) < 1e-5


REFUSALS = [
    ("qwen3_next", 2, "sp_size is 2, but it must be 1 for a model of type qwen3_next: its tokens "
     "are mixed beside the attention"),
    ("deepseek_v32", 2, "it computes with the mask of its attention itself."),
    ("llama4_text", 2, "parts of a row differ"),
    ("mixtral", 3, "sp_size is 3, but it must divide the 4 heads of its attention; 1, 2 and 4 "
     "would work."),
]  # fmt: skip


@pytest.mark.parametrize(("family", "sp_size", "sentence"), REFUSALS)
def test_refusals(family, sp_size, sentence):
    config = RunConfig(
        parallel=ParallelConfig(sp_size=sp_size),
        optim=OptimConfig(per_device_train_batch_size=4),  # rows longer than llama4's scale
    )
    with pytest.raises(ConfigurationError) as caught:
        apply_sequence_parallelism(
            config, build_tiny(family), Packing.ALONE, CPU, Console(quiet=True)
        )
    assert sentence in str(caught.value)
