"""The kernel is checked on every rank, on the run's own weights, and leaves no trace in the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp import fsdp1, fsdp2
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.placement import local_expert_range, local_tensor
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.training.loop import build_training_state, fit
from megablocks_utils.training.resume.random_states import capture_random_states
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.trainer import MoETrainer
from tests.support.fsdp1_run import build_setup_and_arguments
from tests.support.parity import Layout, ParityCase, build_run, build_setup_of
from tests.support.resuming import make_run, run_and_save

NUM_STEPS = 1


@dataclass
class Seen:
    """What one rank saw of a run, in plain data and whole tensors."""

    check: KernelCheck
    placements: list[str]
    local_sizes: list[int]
    random_states: bytes
    numbers: list[tuple[float, float]]
    weights: dict[str, Tensor]


def train(rank: int, script: str, argv: list[str]) -> Seen:
    """Train, and keep what a probe could have changed."""
    numbers: list[tuple[float, float]] = []

    def record(metrics) -> None:
        numbers.append((metrics.loss, metrics.grad_norm))

    if script == "fsdp2":
        setup, state = build_run(argv)
        model, check, gather = state.model, state.kernel_check, fsdp2.full_parameters
    else:
        setup, arguments = build_setup_and_arguments(argv)
        trainer = MoETrainer(setup, arguments, record)
        model, check, gather = trainer.model, trainer.kernel_check, fsdp1.full_parameters
    experts = list(setup.sharded.expert_parameters.values())
    placements = [str(parameter.placements) for parameter in experts]
    local_sizes = [local_tensor(parameter.detach()).numel() for parameter in experts]
    random_states = capture_random_states()
    assert all(isinstance(parameter, DTensor) and parameter.grad is None for parameter in experts)
    if script == "fsdp2":
        for metrics in fit(state, setup):
            record(metrics)
    else:
        trainer.train()
    weights = {name: w.clone() for name, w in gather(model) if w is not None}
    return Seen(check, placements, local_sizes, random_states, numbers, weights)


CASES = [
    ("fsdp2", ParityCase(Layout(4, 2, "shard"), num_steps=NUM_STEPS)),
    ("fsdp2", ParityCase(Layout(4, 1, "shard"), num_steps=NUM_STEPS, lora="mlp-only")),
    ("fsdp1", ParityCase(Layout(2, 2, "replicate"), num_steps=NUM_STEPS)),
]


@pytest.mark.parametrize(("script", "case"), CASES, ids=str)
def test_a_run_is_bit_equal_with_and_without_the_check(pools, parity_folder, script, case):
    def run(*words: str) -> list[Seen]:
        argv = [*parity_folder.argv(case), *words]
        return pools[case.layout.world_size].run(train, script, argv, timeout=240)

    checked, plain = run(), run("--verify_kernel", "False")
    for seen, other in zip(checked, plain, strict=True):
        assert seen.check == checked[0].check  # the same on all ranks
        assert 0 < seen.check.worst < 2 and seen.check.skipped is None
        assert other.check == KernelCheck(skipped="--verify_kernel is False")
        assert seen.placements == other.placements
        assert seen.local_sizes == other.local_sizes
        assert seen.random_states == other.random_states
        assert seen.numbers == other.numbers and len(seen.numbers) == NUM_STEPS
        assert all(torch.equal(seen.weights[name], w) for name, w in other.weights.items())


def scale_a_gradient(backend):
    """Return a backend whose gradient of W2 is 5% too large."""

    def run(
        tokens: Tensor, order: ExpertOrder, weights: Tensor | None, experts: ExpertWeights
    ) -> Tensor:
        def spoil(tensor: Tensor) -> Tensor:
            is_spoilt = tensor is experts.down_proj
            return 1.05 * tensor - (0.05 * tensor).detach() if is_spoilt else tensor

        return backend(tokens, order, weights, experts.map_tensors(spoil))

    return run


def meet_bug_of_one_rank(rank: int, script: str, argv: list[str]) -> str:
    """Build a run in which the backend of rank 1 has a bug."""
    setup, build = prepare(script, argv)
    if rank == 1:
        for module in setup.sharded.expert_modules.values():
            module.backend = scale_a_gradient(module.backend)
    try:
        build()
    except ConfigurationError as error:
        return str(error)
    return "nothing was wrong"


def prepare(script: str, argv: list[str]) -> tuple[Setup, Any]:
    """Return a setup and what makes it ready for its first step."""
    if script == "fsdp2":
        setup = build_setup_of(argv)
        return setup, lambda: build_training_state(setup)
    setup, arguments = build_setup_and_arguments(argv)
    return setup, lambda: MoETrainer(setup, arguments, lambda metrics: None)


@pytest.mark.parametrize(("script", "case"), [CASES[0], CASES[2]], ids=str)
def test_a_bug_on_one_rank_ends_all(pools, parity_folder, script, case):
    answers = pools[case.layout.world_size].run(
        meet_bug_of_one_rank, script, parity_folder.argv(case)
    )
    assert answers == answers[:1] * case.layout.world_size
    assert answers[0].startswith(
        "kernel grouped_mm fails its check on this model's weights: its gradient of down_proj is "
        "off by 5.0e-02"
    )


def watch_first_weights(rank: int, script: str, argv: list[str]) -> tuple[Tensor, Tensor]:
    """Return the first experts as the check has seen them, and as the first step will use them."""
    setup, build = prepare(script, argv)
    module = next(iter(setup.sharded.expert_modules.values()))
    seen = watch(module)
    built = build()
    if script == "fsdp1":
        built._prepare_for_training(1, built.get_train_dataloader(), None)
    mine = local_expert_range(module.num_experts, module.mesh)
    return seen[0], module.gate_up_proj.detach().full_tensor()[mine.start : mine.start + 2].clone()


def watch(module: DroplessExperts) -> list[Tensor]:
    """Keep the experts of every call of a module's backend."""
    seen, backend = [], module.backend

    def run(tokens, order, weights, experts: ExpertWeights) -> Tensor:
        seen.append(experts.gate_up_proj.detach().clone())
        return backend(tokens, order, weights, experts)

    module.backend = run
    return seen


@pytest.mark.parametrize(
    ("script", "layout"),
    [("fsdp2", Layout(4, 2, "shard")), ("fsdp1", Layout(2, 2, "replicate"))],
)
def test_a_resumed_run_is_checked_on_restored_weights(
    pools, parity_folder, tmp_path: Path, script, layout
):
    """Whole ones, also where ranks of `dp` hold a part each."""
    run = make_run(script, layout, num_steps=1, saved_step=1)
    saved = run_and_save(pools, parity_folder, run, tmp_path)
    argv = [*parity_folder.argv(run.case), "--output_dir", str(tmp_path)]
    argv += ["--max_steps", "2", "--resume_from_checkpoint", str(saved.checkpoint)]
    for checked, used in pools[layout.world_size].run(watch_first_weights, script, argv):
        assert torch.equal(checked, used) and used.any()
