"""This project's exchange and kernels inside transformers' expert parallelism, against stock."""

from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import Transpose
from transformers.distributed import DistributedConfig
from transformers.distributed.mixin import DistributedMixin

from megablocks_utils import register_ep_implementation
from tests.families.inside import Sizes, find_largest_error
from tests.support.parity import starve_experts
from tests.support.tiny_families import save_tiny

CASES = {
    "gpt_oss": ("gpt_oss", Sizes(2, 2), {}),
    "nemotron_h": ("nemotron_h", Sizes(2, 2), {}),
    "gemma4_text": ("gemma4_text", Sizes(2, 2), {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", Sizes(2, 2), {}),
    "qwen3_vl_moe, tp 2": ("qwen3_vl_moe", Sizes(2, 1, 2), {}),
    "no token, 4 ranks": ("olmoe", Sizes(4, 4), {"num_experts_per_tok": 1}),
}
# Stock's own fp32 is that far from fp64.
TOLERANCE = {"gemma4_text": 1e-4}


@pytest.mark.parametrize("case", CASES)
def test_transformers_runs_ours_and_gets_stocks_gradients(ranks2, ranks4, tmp_path, case):
    family, sizes, options = CASES[case]
    model = save_tiny(family, tmp_path, **options)
    if "no token" in case:  # for the experts of any rank but the first
        starve_experts(model)
        model.save_pretrained(tmp_path)
    pool = {2: ranks2, 4: ranks4}[sizes.world_size]
    error, name = find_largest_error(pool, tmp_path, sizes)
    assert error < TOLERANCE.get(case, 1e-5), name


def adapt_experts_in_transformers(rank, folder):
    register_ep_implementation()
    config = DistributedConfig(ep_size=2, fsdp_size=2, ep_implementation="megablocks_utils")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=targets))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        adapted(input_ids=torch.arange(3, 9)[None])


def test_peft_stops_at_experts_that_transformers_has_split(ranks2, tmp_path):
    """No loss of theirs is wrong in silence; if PEFT learns it, the gradients must be compared."""
    save_tiny("mixtral", tmp_path)
    ranks2.run(adapt_experts_in_transformers, str(tmp_path))


def load_without_mending(rank, folder, owner, name, auto, message):
    """What transformers does by itself, with this project's experts in it."""
    register_ep_implementation()
    config = DistributedConfig(ep_size=2, fsdp_size=2, ep_implementation="megablocks_utils")
    with (
        mock.patch.object(owner, name, getattr(owner, name).__wrapped__),
        pytest.raises(RuntimeError, match=message),
    ):
        auto.from_pretrained(folder, distributed_config=config)


def test_transformers_still_needs_mending(ranks2, tmp_path):
    """Where this fails, a release has mended it: delete the part of `ep_workarounds` it names."""
    for family, *fault in (
        (
            "gemma4_text",
            DistributedMixin,
            "_resolve_parallel_plans",
            AutoModelForCausalLM,
            "Cannot concatenate overlapping meshes",
        ),
        (
            "qwen3_vl_moe",
            Transpose,
            "convert",
            AutoModelForImageTextToText,
            "ignore_mismatched_sizes",
        ),
    ):
        save_tiny(family, tmp_path / family)
        ranks2.run(load_without_mending, str(tmp_path / family), *fault)
