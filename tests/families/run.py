"""One step of a family through this project's own path, on the ranks of a pool."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megablocks_utils.errors import UserError
from megablocks_utils.fsdp.fsdp2 import full_parameters
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_spec
from megablocks_utils.training.loop import TrainingState, build_training_state, fit
from megablocks_utils.training.recorder import RunRecorder
from megablocks_utils.training.setup import Setup
from tests.families.describe import describe_experts
from tests.families.stock import Step, plain_name
from tests.support.parity import build_setup_of

__all__ = ["Seen", "train_family"]


@dataclass
class Seen:
    """What rank 0 saw of a run.

    Attributes:
        refusal: the sentence of a run that was refused; empty for one that came to its end.
        step: its loss and gradients.
        weights: every parameter that was trained, whole, after the step.
        experts: what its experts are.
        batches: how examples share a micro-batch.
    """

    refusal: str = ""
    step: Step | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    experts: str = ""
    batches: str = ""


def train_family(rank: int, argv: list[str], *, draws: bool = False) -> Seen:
    """Train a step and write the model or adapter, as the FSDP2 script does.

    Args:
        rank: of the pool.
        argv: options of the script.
        draws: whether the model draws at random in training, so that it is compared out of it.
    """
    try:
        setup = build_setup_of(argv)
        setup.console.quiet = True
        state = build_training_state(setup)
        if draws:
            _keep_out_of_training(state.model)
        return _train(setup, state)
    except UserError as error:
        return Seen(refusal=str(error))


def _train(setup: Setup, state: TrainingState) -> Seen:
    gradients: dict[str, Tensor] = {}

    def gather(_optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad:
                gradients[plain_name(name)] = _whole_gradient(parameter)

    state.optimizer.optimizer.register_step_pre_hook(gather)
    recorder, is_lora = RunRecorder(setup), setup.config.adapter.has_lora
    with recorder:
        for metrics in fit(state, setup):
            recorder.record(metrics)
        tensors = full_parameters(state.model, only_trainable=is_lora)
        recorder.finish(state.run_state(), tensors, state.kernel_check)
    weights = dict(_whole_weights(state.model, only_trainable=is_lora))
    step = Step(metrics.loss, metrics.grad_norm, gradients)
    if setup.launch.rank:
        return Seen()
    return Seen("", step, weights, _experts_of(state.model), _batches_of(setup))


def _whole_gradient(parameter: nn.Parameter) -> Tensor:
    """Return the whole gradient. **Collective:** over the axes that shard it."""
    if parameter.grad is None:
        return torch.zeros(parameter.shape)
    grad = parameter.grad
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()


def _whole_weights(model: nn.Module, *, only_trainable: bool) -> Iterator[tuple[str, Tensor]]:
    for name, weight in full_parameters(model, only_trainable=only_trainable):
        if weight is not None:
            yield name, weight.clone()


def _keep_out_of_training(model: nn.Module) -> None:
    """Let `train` leave a model as it is for inference."""
    for module in model.modules():
        module.eval()
        module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]


def _experts_of(model: nn.Module) -> str:
    specs = {read_expert_spec(module) for module in find_expert_modules(model).values()}
    return " / ".join(sorted({describe_experts(spec) for spec in specs}))


def _batches_of(setup: Setup) -> str:
    """Say how examples share a micro-batch: in a row, kept apart by what, or padded."""
    return str(setup.probe.packing.packing)
