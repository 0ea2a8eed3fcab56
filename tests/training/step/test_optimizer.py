"""The optimizer and schedule a run gets: class, groups, decay, values on several meshes."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

from megablocks_utils.training.step.optimizer import (
    build_lr_scheduler,
    build_optimizer,
    has_weight_decay,
)
from megablocks_utils.training.step.stochastic_rounding import StochasticRoundingAdamW


def optim_config(**changes):
    values = {
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    }
    return SimpleNamespace(**{**values, **changes})


def precision(optim="float32", stochastic_rounding=False):
    return SimpleNamespace(optim=optim, stochastic_rounding=stochastic_rounding)


def linear_parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return list(torch.nn.Linear(6, 4).to(dtype).named_parameters())


@pytest.mark.parametrize(
    ("weights", "optim", "stochastic", "expected", "rounds_weights"),
    [
        (torch.float32, "float32", False, torch.optim.AdamW, None),
        (torch.bfloat16, "bfloat16", False, torch.optim.AdamW, None),
        (torch.bfloat16, "bfloat16", True, StochasticRoundingAdamW, True),
        (torch.bfloat16, "float32", False, StochasticRoundingAdamW, False),
        (torch.float32, "bfloat16", False, StochasticRoundingAdamW, False),
    ],
)
def test_class_and_dtypes_follow_the_precision(
    weights, optim, stochastic, expected, rounds_weights
):
    parameters = linear_parameters(weights)
    optimizer = build_optimizer(parameters, optim_config(), precision(optim, stochastic), seed=0)
    assert type(optimizer) is expected
    assert getattr(optimizer, "_stochastic_weights", None) is rounds_weights
    before = [p.detach().clone() for _, p in parameters]
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for old, (_, parameter) in zip(before, parameters, strict=True):
        assert parameter.dtype == weights
        assert optimizer.state[parameter]["exp_avg"].dtype == getattr(torch, optim)
        tolerance = 1e-6 if weights == torch.float32 else 2**-8
        torch.testing.assert_close(parameter.float(), old.float() - 1e-2, rtol=0, atol=tolerance)


def test_hyperparameters_and_frozen_parameters():
    parameters = linear_parameters()
    parameters[1][1].requires_grad_(False)
    optimizer = build_optimizer(parameters, optim_config(weight_decay=0.1), precision(), seed=0)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(parameters[0][1])]
    assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.999), 1e-8)
    assert (group["weight_decay"], group["fused"]) == (0.1, True)


def test_seed_and_plain_shard_reach_the_random_bits():
    def weights_after(**options):
        weight = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        settings = precision("bfloat16", stochastic_rounding=True)
        config = optim_config(learning_rate=1e-3)
        optimizer = build_optimizer([("weight", weight)], config, settings, **options)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight

    first = weights_after(seed=0)
    assert torch.equal(first, weights_after(seed=0))
    assert not torch.equal(first, weights_after(seed=1))
    assert not torch.equal(first, weights_after(seed=0, plain_shard=1))


def test_nothing_to_train_is_an_error():
    parameters = linear_parameters()
    for _, parameter in parameters:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="^optimizer got an empty parameter list$"):
        build_optimizer(parameters, optim_config(), precision(), seed=0)


def test_without_weight_decay_one_group_with_it_two():
    parameters = linear_parameters()
    single = build_optimizer(parameters, optim_config(), precision(), seed=0)
    assert [len(group["params"]) for group in single.param_groups] == [2]
    double = build_optimizer(parameters, optim_config(weight_decay=0.1), precision(), seed=0)
    assert [group["weight_decay"] for group in double.param_groups] == [0.1, 0.0]


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "mixtral": MixtralConfig(num_local_experts=4, **TINY),
    "qwen3_moe": Qwen3MoeConfig(
        num_experts=4, moe_intermediate_size=8, head_dim=8, attention_bias=True, **TINY
    ),
    "olmoe": OlmoeConfig(num_experts=4, **TINY),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_rule_is_trainer_s(family, tmp_path):
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], weight_decay=0.1
    )
    trainer = Trainer(model=model, args=arguments)
    names = {id(p): name for name, p in model.named_parameters()}

    def names_by_decay(optimizer):
        return {
            group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
            for group in optimizer.param_groups
        }

    theirs = names_by_decay(trainer.create_optimizer())
    ours = names_by_decay(
        build_optimizer(
            model.named_parameters(), optim_config(weight_decay=0.1), precision(), seed=0
        )
    )
    assert ours == theirs
    assert "model.norm.weight" in ours[0.0]
    assert "model.layers.0.mlp.experts.gate_up_proj" in ours[0.1]


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.normalizer.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.norm.weight", False),
        ("norm.weight", False),
        ("block.RMSNorm_0.weight", False),
    ],
)
def test_decay_rule_by_name(name, decayed):
    assert has_weight_decay(name) is decayed


@pytest.mark.parametrize(("warmup_steps", "whole"), [(0, 0), (2, 2), (0.15, 2), (1, 1)])
def test_linear_schedule_with_whole_steps_or_a_share(warmup_steps, whole):
    optimizer = build_optimizer(linear_parameters(), optim_config(), precision(), seed=0)
    scheduler = build_lr_scheduler(optimizer, optim_config(warmup_steps=warmup_steps), 10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    up = [1e-2 * step / whole for step in range(whole)]
    down = [1e-2 * (10 - step) / (10 - whole) for step in range(whole, 10)]
    assert rates == pytest.approx(up + down, rel=1e-12)
    assert scheduler.get_last_lr() == [0.0]


def test_schedule_type_is_the_named_one():
    optimizer = build_optimizer(linear_parameters(), optim_config(), precision(), seed=0)
    scheduler = build_lr_scheduler(optimizer, optim_config(lr_scheduler_type="cosine"), 4)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-2 * (1 + math.cos(math.pi / 2)) / 2)


# --- on connected ranks ---------------------------------------------------------------------------


def full_values(seed):
    """Return dense weights, experts to copy and to shard over dp, and plain tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "dense.weight": (8, 6),
        "norm.weight": (6,),
        "copied_experts": (4, 6, 5),
        "sharded_experts": (4, 6, 5),
        "plain.weight": (3, 3),
        "empty.weight": (0,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def placed_values(seed, mesh, world):
    placements = {
        "dense.weight": (world, [Shard(0)]),
        "norm.weight": (world, [Shard(0)]),
        "copied_experts": (mesh["ep"], [Shard(0)]),
        "sharded_experts": (mesh, [Shard(1), Shard(0)]),
    }
    return {
        name: distribute_tensor(full, *placements[name]) if name in placements else full
        for name, full in full_values(seed).items()
    }


def train_mixed_parameters(rank, stochastic_rounding):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    world = init_device_mesh("cpu", (4,))
    parameters = {
        name: torch.nn.Parameter(value) for name, value in placed_values(0, mesh, world).items()
    }
    optimizer = build_optimizer(
        parameters.items(),
        optim_config(weight_decay=0.1),
        precision("float32", stochastic_rounding),
        seed=0,
        plain_shard=rank,
    )
    for step in range(1, 6):
        for name, gradient in placed_values(step, mesh, world).items():
            parameters[name].grad = gradient
        optimizer.step()
    full = {
        name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()
    }
    return {name: value.detach() for name, value in full.items()}, len(optimizer.param_groups)


@pytest.mark.parametrize("stochastic_rounding", [False, True], ids=["pytorch", "ours"])
def test_meshes_and_plain_tensors_in_one_optimizer_equal_one_process(ranks4, stochastic_rounding):
    expected = {name: torch.nn.Parameter(value) for name, value in full_values(0).items()}
    norm = expected.pop("norm.weight")
    groups = [
        {"params": list(expected.values()), "weight_decay": 0.1},
        {"params": [norm], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    expected["norm.weight"] = norm
    for step in range(1, 6):
        for name, gradient in full_values(step).items():
            expected[name].grad = gradient
        optimizer.step()
    for full, num_groups in ranks4.run(train_mixed_parameters, stochastic_rounding):
        assert num_groups == 5
        assert full.keys() == expected.keys()
        for name, value in full.items():
            torch.testing.assert_close(value, expected[name].detach(), rtol=1e-6, atol=1e-7)


def offloaded(kind, states, stochastic=False):
    """Build one of the two optimizers over nine parameters, of which one is the largest by far."""
    sizes = (40, 7, 9, 16, 3, 30, 5, 1, 12)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if stochastic else torch.float32
    named = [
        (f"w{n}", torch.nn.Parameter(torch.randn(size).to(dtype))) for n, size in enumerate(sizes)
    ]
    optimizer = build_optimizer(
        named,
        optim_config(weight_decay=0.1),
        precision(states, stochastic),
        seed=3,
        cpu_offload=kind,
    )
    return optimizer, [parameter for _, parameter in named]


def take_steps(optimizer, parameters, first, last):
    """Update from step `first` on; one parameter has no gradient in odd steps."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if number == 2 and step % 2 else grad
        optimizer.step()


@pytest.mark.parametrize(
    ("states", "stochastic"), [("float32", False), ("bfloat16", True)], ids=str
)
def test_states_in_host_memory_change_no_bit(states, stochastic):
    plain, wanted = offloaded("none", states, stochastic)
    hosted, seen = offloaded("optimizer", states, stochastic)
    take_steps(plain, wanted, 0, 2)
    take_steps(hosted, seen, 0, 2)
    # Each resumes from what the other has saved.
    plain_saved, hosted_saved = copy.deepcopy(plain.state_dict()), hosted.state_dict()
    plain.load_state_dict(copy.deepcopy(hosted_saved))
    hosted.load_state_dict(plain_saved)
    assert [len(part) for part in hosted._parts()] == [1, 4, 3, 1]
    take_steps(plain, wanted, 2, 4)
    take_steps(hosted, seen, 2, 4)
    assert all(map(torch.equal, seen, wanted))
    for parameter, other in zip(seen, wanted, strict=True):
        ours, theirs = hosted.state[parameter], plain.state[other]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_a_part_of_the_states_is_on_the_device(monkeypatch):
    """On tensors that say they are a GPU's: it is the update's operators that meet states there."""
    monkeypatch.setattr(
        torch.accelerator, "current_stream", lambda: SimpleNamespace(synchronize=int)
    )
    with FakeTensorMode():
        named = [
            (f"w{n}", torch.nn.Parameter(torch.empty(size, device="cuda")))
            for n, size in enumerate((4, 9, 5))
        ]
        optimizer = build_optimizer(
            named, optim_config(), precision(), seed=0, cpu_offload="optimizer"
        )
        on_device, update = [], torch.optim.AdamW.step

        def watch(optimizer):
            averages = [state["exp_avg"] for state in optimizer.state.values() if state]
            on_device.append([len(average) for average in averages if average.is_cuda])
            update(optimizer)

        monkeypatch.setattr(torch.optim.AdamW, "step", watch)
        for _ in range(2):
            for _, parameter in named:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
        for _, parameter in named:
            state = optimizer.state[parameter]
            assert {state[name].device.type for name in ("exp_avg", "exp_avg_sq")} == {"cpu"}
    assert on_device == [[], [], [], [4], [9], [5]]  # made in the first step, brought in the second
