"""FSDP1: what is wrapped and reduced, and what is refused. Whole runs: test_fsdp1_parity."""

from unittest import mock

import pytest
import torch

from megablocks_utils.config import RunConfig, resolve_precision
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp import fsdp1
from tests.support.fsdp1_run import build_trainer
from tests.support.tiny_models import save_tiny_model

NUM_UNITS = 3  # two layers and the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp1")
    save_tiny_model("mixtral", folder / "model")
    (folder / "data.json").write_text('[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]')
    return folder


def _argv(folder, **options):
    options = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.json",
        "output_dir": folder / "out",
        "use_megablocks_sharding": True,
        "max_steps": 1,
        "gradient_accumulation_steps": 4,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _count_reductions(rank, argv):
    trainer = build_trainer(argv)
    with mock.patch.object(fsdp1, "_reduce_scatter", wraps=fsdp1._reduce_scatter) as reduce:
        trainer.train()
    return reduce.call_count


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sync_each_batch": True}, 4 * NUM_UNITS),
        ({"sync_each_batch": False}, NUM_UNITS),
        ({"sync_each_batch": False, "use_lora": "attn-only"}, 2),  # one a layer, its adapters
    ],
)
def test_reductions_of_a_step(ranks2, folder, options, wanted):
    assert ranks2.run(_count_reductions, _argv(folder, **options)) == [wanted, wanted]


def _describe_shards(rank, argv):
    trainer = build_trainer(argv)
    units = fsdp1._units(trainer.model)
    own = {
        fsdp1.strip_wrappers(prefix) + type(unit.module).__name__: [
            (name, p.dtype) for name, p in fsdp1._own_parameters(unit).items()
        ]
        for prefix, unit in units.items()
    }
    names = [name for name, _ in fsdp1.full_parameters(trainer.model)]
    trainable = list(fsdp1.full_parameters(trainer.model, only_trainable=True))
    wanted = [fsdp1.strip_wrappers(name) for name, _ in trainer.model.named_parameters()]
    assert names == wanted
    assert all((tensor is None) == (rank > 0) for _, tensor in trainable)
    return own, [name for name, _ in trainable]


def test_adapters_have_units_of_their_own(ranks2, folder):
    """A flat parameter has one dtype: bf16 for the frozen base, fp32 for the adapters."""
    argv = _argv(folder, use_lora="attn-only", precision="mixed")
    units, trainable = ranks2.run(_describe_shards, argv)[0]
    layer = "model.layers.1."
    adapters = units[f"{layer}FullyShardedDataParallel"]
    frozen = units[f"{layer}MixtralDecoderLayer"]
    assert len(adapters) == 8
    assert all("lora_" in name and dtype == torch.float32 for name, dtype in adapters)
    assert all("lora_" not in name and dtype == torch.bfloat16 for name, dtype in frozen)
    assert not any("experts" in name for name, _ in frozen)
    assert len(trainable) == 16
    assert all(".lora_" in name for name in trainable)


@pytest.mark.parametrize("strategy", ["NO_SHARD", "HYBRID_SHARD"])
def test_strategies_that_do_not_shard_over_the_world_are_refused(monkeypatch, strategy):
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", strategy)
    with pytest.raises(ConfigurationError) as error:
        fsdp1.build_fsdp1_plugin(resolve_precision(RunConfig(), "cpu"))
    assert str(error.value) == (
        f"fsdp_sharding_strategy is {strategy} in Accelerate's configuration, but it must be "
        "FULL_SHARD or SHARD_GRAD_OP."
    )
