"""The FSDP1 script's path on one rank of a pool, for the cases of `parity`."""

from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainingArguments

from megablocks_utils.config import parse_known_args
from megablocks_utils.fsdp.fsdp1 import full_parameters, strip_wrappers
from megablocks_utils.moe.sharded_moe import find_slots
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.report.metrics import StepMetrics
from megablocks_utils.training.setup import Setup, build_setup
from megablocks_utils.training.trainer import MoETrainer
from megablocks_utils.training.trainer_arguments import build_trainer_arguments, parse_trainer_flags
from tests.support.argv import keep_last
from tests.support.parity import gather_gradient
from tests.support.trace import Trace


def build_trainer(argv: list[str], on_step=lambda metrics: None) -> MoETrainer:
    """Do on a rank of a pool what the FSDP1 script does before its first step."""
    return MoETrainer(*build_setup_and_arguments(argv), on_step)


def build_setup_and_arguments(argv: list[str]) -> tuple[Setup, TrainingArguments]:
    """Do on a rank of a pool what the FSDP1 script does before it makes the trainer."""
    config, leftovers = parse_known_args(keep_last(argv), entry_point="fsdp1")
    launch = check_environment(config)
    flags = parse_trainer_flags(leftovers)
    device = start_processes(launch)
    arguments = build_trainer_arguments(flags, config, device.type)
    return build_setup(config, launch, device), arguments


def train_fsdp1(rank: int, argv: list[str]) -> Trace:
    """Run the FSDP1 script's path, and check that Trainer's log says what the metrics say."""
    trace = Trace()

    def record(metrics: StepMetrics) -> None:
        trace.losses.append(metrics.loss)
        trace.grad_norms.append(metrics.grad_norm)
        trace.learning_rates.append(metrics.learning_rate)

    trainer = build_trainer(argv, record)
    trainer.add_callback(_FirstGradients(trainer.model, trace))
    trainer.train()
    only_trainable = not {"--use_lora", "--lora_target"}.isdisjoint(argv)
    weights = full_parameters(trainer.model, only_trainable=only_trainable)
    trace.weights = {name: weight for name, weight in weights if weight is not None}
    if rank:
        trace.first_gradients.clear()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(abs(a - b) / b for a, b in zip(logged, trace.losses, strict=True)) < 1e-6
    return trace


class _FirstGradients(TrainerCallback):
    """Gather every gradient right before the first optimizer step."""

    def __init__(self, model: FullyShardedDataParallel, trace: Trace) -> None:
        self.model = model
        self.trace = trace

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.trace.first_gradients:
            return
        with FullyShardedDataParallel.summon_full_params(
            self.model, writeback=False, with_grads=True
        ):
            slots = find_slots(self.model)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    grad = gather_gradient(parameter, slots)
                    self.trace.first_gradients[strip_wrappers(name)] = grad
