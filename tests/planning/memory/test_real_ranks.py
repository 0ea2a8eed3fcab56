"""Bytes held and sent as the formula has them, against four real ranks, to the byte."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from megablocks_utils.config import parse_args, parse_known_args, resolve_precision
from megablocks_utils.planning.memory.formula import predict
from megablocks_utils.planning.memory.unit_builder import build_units
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun
from megablocks_utils.training.loop import fit
from tests.support.communication import CommunicationCounter
from tests.support.fsdp1_run import build_trainer
from tests.support.parity import build_run
from tests.support.tiny_models import save_tiny_model

WORLD_SIZE, LENGTH, BATCH = 4, 16, 3
TOKENS = LENGTH * BATCH
NONE, SHARD, COPIES, WHOLE = (
    ParallelLayout(1, "shard"),
    ParallelLayout(2, "shard"),
    ParallelLayout(2, "replicate"),
    ParallelLayout(4, "shard"),
)
MODELS = {
    "even": ("mixtral", {"num_local_experts": 4}),
    # Nothing divides by 4: 6 experts and 130 words; nor do the 3 experts of a rank by 2.
    "uneven": ("mixtral", {"num_local_experts": 6, "vocab_size": 130}),
    # Norms of 18 numbers, which FSDP1 fills up to 20 in fp32.
    "odd": ("qwen3_moe", {"head_dim": 18, "num_hidden_layers": 1}),
}
COLLECTIVES = ("all_gather", "reduce_scatter")


@dataclass
class Measured:
    """What a rank held, and moved in its second step."""

    parameters: int
    gradients: int
    optimizer: int
    num_bytes: dict[str, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and examples of equal length."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, (family, overrides) in MODELS.items():
        save_tiny_model(family, folder / name, **overrides)
    tokens = [3 + i % 100 for i in range(LENGTH)]
    examples = [{"input_ids": tokens, "labels": tokens}] * 48
    (folder / "data.json").write_text(json.dumps(examples))
    return folder


def argv_of(folder, model, layout, options):
    flags = {
        "model_name_or_path": folder / model,
        "data_path": folder / "data.json",
        "output_dir": folder / "unused",
        "max_steps": 2,
        "per_device_train_batch_size": BATCH,
        "report_to": "none",
        "verify_kernel": False,
        **options,
    }
    if layout.ep_size > 1:
        flags |= {"use_megablocks_sharding": True, "ep_size": layout.ep_size}
        flags |= {"expert_dp": layout.expert_dp}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_fsdp2(rank, argv):
    """Take two steps in which every expert gets as many rows; a `Measured`."""
    setup, state = build_run(argv)
    _spread_rows(setup.sharded, setup.config.parallel.token_dispatch)
    gradients = []
    trained = [p for p in state.model.parameters() if p.requires_grad]
    optimizer = state.optimizer.optimizer
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append(_sum_bytes(p.grad for p in trained))
    )
    steps = fit(state, setup)
    next(steps)
    with CommunicationCounter() as counter:
        next(steps)
    parameters = (p.to_local() for p in state.model.parameters())
    held = sum(local.untyped_storage().nbytes() for local in parameters)
    states = (value for state in optimizer.state.values() for value in state.values())
    return Measured(held, gradients[-1], _sum_bytes(states), dict(counter.num_bytes))


def run_fsdp1(rank, argv):
    """Do the same on the other script's path."""
    trainer = build_trainer(argv)
    model, counter = trainer.model, CommunicationCounter()

    class SecondStep(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **_):
            if state.global_step == 1:
                counter.__enter__()

        def on_step_end(self, arguments, state, control, **_):
            if state.global_step == 2:
                counter.__exit__(None, None, None)

    trainer.add_callback(SecondStep())
    trainer.train()
    units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
    flat = (unit._handle.flat_param._local_shard for unit in units if unit._handle is not None)
    experts = (p.to_local() for p in model.parameters() if hasattr(p, "to_local"))
    return Measured(_sum_bytes((*flat, *experts)), 0, 0, dict(counter.num_bytes))


def _spread_rows(sharded, dispatch):
    """Have every expert get the same number of rows, and every pair of them where tokens travel."""

    def hook(module, inputs):
        hidden_states, index, weights = inputs
        spread = index.new_tensor(range(index.numel())) % module.num_experts
        if dispatch != "rows":
            pairs = torch.combinations(torch.arange(module.num_experts), index.shape[1])
            spread = pairs.repeat(-(-len(index) // len(pairs)), 1)[: len(index)]
        return hidden_states, spread.view_as(index), weights

    for module in sharded.expert_modules.values() if sharded else ():
        module.register_forward_pre_hook(hook)


def _sum_bytes(tensors):
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def plan_of(folder, model, argv, entry_point):
    """Return the shape and the run that a command line means."""
    parse = parse_args if entry_point == "fsdp2" else lambda *a, **k: parse_known_args(*a, **k)[0]
    config = parse(argv, entry_point=entry_point)
    shape = ModelShape.from_config(json.loads((folder / model / "config.json").read_text()))
    return shape, PlannedRun(
        world_size=WORLD_SIZE,
        entry_point=entry_point,
        precision=resolve_precision(config, "cpu"),
        use_lora=config.adapter.use_lora,
        lora_r=config.adapter.lora_r,
        gradient_checkpointing=config.gradient_checkpointing,
        accumulation=config.optim.gradient_accumulation_steps,
        sync_each_batch=config.optim.sync_each_batch,
        tokens=TOKENS,
        label_tokens=TOKENS - BATCH,
        kernel="grouped_mm",
        imbalance=1.0,
        has_aux_loss=False,
        device_type="cpu",
        examples=BATCH,
        token_dispatch=config.parallel.token_dispatch,
    )


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [
        ("uneven", NONE, {"gradient_accumulation_steps": 2}),
        (
            "uneven",
            COPIES,
            {
                "gradient_accumulation_steps": 2,
                "sync_each_batch": False,
                "precision": "mixed",
                "token_dispatch": "rows",
            },
        ),
        ("even", WHOLE, {"precision": "bf16_sr", "gradient_checkpointing": "False"}),
        (
            "uneven",
            SHARD,
            {
                "use_lora": "all",
                "lora_r": 3,
                "gradient_accumulation_steps": 2,
                "token_dispatch": "rows",
            },
        ),
        ("even", COPIES, {"use_lora": "mlp-only", "gradient_checkpointing": "False"}),
        ("even", WHOLE, {"use_lora": "attn-only", "precision": "mixed"}),
    ],
    ids=str,
)
def test_fsdp2(ranks4, folder, model, layout, options):
    argv = argv_of(folder, model, layout, options)
    first, *others = ranks4.run(run_fsdp2, argv)
    shape, run = plan_of(folder, model, argv, "fsdp2")
    told = predict(shape, layout, run)
    assert told.components["parameters"] == first.parameters
    assert told.components["optimizer"] == first.optimizer
    assert max(other.parameters for other in others) <= first.parameters
    sent = told.sent_bytes_per_step
    rows = first.num_bytes.get("all_to_all of rows", 0)
    counts = first.num_bytes.get("all_to_all of counts", 0)
    routing = first.num_bytes.get("all_to_all of routing", 0)
    assert sent["all_to_all"] == rows + counts + routing
    for kind in COLLECTIVES:
        assert sent[kind] == first.num_bytes.get(kind, 0), kind
    # Of the copies over dp a rank sends what it holds once, 2 * (2 - 1) / 2. Besides, the norm's 8
    # bytes go over 4 ranks, and a few dozen of metrics, which are not counted.
    copies = sent["all_reduce"] - 8 * 2 * 3 // 4
    assert 0 < first.num_bytes["all_reduce"] - 8 - copies < 100
    assert build_units(shape, layout, run).sum("trained_bytes") == first.gradients


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [
        ("odd", NONE, {}),
        ("even", COPIES, {"use_lora": "all", "precision": "mixed"}),
    ],
    ids=str,
)
def test_fsdp1(ranks4, folder, model, layout, options):
    argv = argv_of(folder, model, layout, options)
    first = ranks4.run(run_fsdp1, argv)[0]
    shape, run = plan_of(folder, model, argv, "fsdp1")
    told = predict(shape, layout, run)
    assert told.components["parameters"] == first.parameters
    for kind in COLLECTIVES:
        assert told.sent_bytes_per_step[kind] == first.num_bytes.get(kind, 0), kind
