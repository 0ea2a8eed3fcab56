"""The two training runs that can be rehearsed: each script's own way of wrapping and stepping."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from megablocks_utils.config import RunConfig
from megablocks_utils.config.optim import MUON
from megablocks_utils.fsdp.fsdp1 import build_fsdp1_plugin, fill_and_wrap_fsdp1, strip_wrappers
from megablocks_utils.fsdp.fsdp2 import (
    build_accelerator,
    fill_layers,
    find_layers,
    prefetches_units,
    reduce_across_groups,
    wrap_fsdp2,
)
from megablocks_utils.mesh.placement import is_replicated, mark_replicated
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.planning.model.prediction import PlannedRun
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.loop import TrainingState, run_micro_batch
from megablocks_utils.training.step.finish import StepFinish
from megablocks_utils.training.step.learn_logits_map import find_logits_map
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.step.muon import find_matrices
from megablocks_utils.training.step.optimizer import build_lr_scheduler, build_optimizer

__all__ = ["Fsdp1Run", "Fsdp2Run", "RehearsalInputs", "move_to_meta"]

_SEED = 42
_NUM_STEPS = 1000
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class RehearsalInputs:
    """What both runs are made of.

    Attributes:
        model: on meta, not wrapped.
        sharded: how its experts are split; None where transformers runs them.
        config: the options.
        run: what is planned.
        device: where tensors will be.
        dense_mesh: of what is not experts; None where FSDP shards it over the world.
    """

    model: PreTrainedModel
    sharded: ShardedMoE | None
    config: RunConfig
    run: PlannedRun
    device: torch.device
    dense_mesh: DeviceMesh | None = None

    def find_logits_map(self) -> LogitsMap | None:
        """Return what the model does to its logits, unless all are to be there at once."""
        return None if self.run.has_whole_logits else find_logits_map(self.model)[0]


class Fsdp2Run:
    """What `train_accelerate_fsdp2.py` does.

    Made outside of fake tensors, where a `DeviceMesh` can be made, with the model on meta; then
    `fill` it.

    Attributes:
        model: wrapped.
        optimizer: after `fill`.
        logits_map: what the model does to its logits, see `LossWeights`.
    """

    optimizer: Optimizer

    def __init__(self, inputs: RehearsalInputs) -> None:
        self._inputs = inputs
        self.logits_map = inputs.find_logits_map()
        model, precision = inputs.model, inputs.run.precision
        classes = layer_classes(model)
        device_type, mesh = inputs.device.type, inputs.dense_mesh
        is_muon = inputs.config.optim.optim == MUON
        self._matrices = find_matrices(model, []) if is_muon else set()
        self._accelerator = build_accelerator(inputs.config, precision, classes, device_type, mesh)
        self._layers = find_layers(model, self._accelerator)
        prefetches = prefetches_units(inputs.sharded, inputs.run.device_type)
        self.model = wrap_fsdp2(self._accelerator, model, inputs.sharded, prefetches=prefetches)

    def fill(self) -> None:
        """Give all parameters their memory, and make the optimizer."""
        accelerator, inputs = self._accelerator, self._inputs
        fill_layers(accelerator, self.model, self._layers, fill_at_random)
        self.optimizer = build_optimizer(
            self.model.named_parameters(),
            inputs.config.optim,
            inputs.run.precision,
            seed=_SEED,
            cpu_offload=inputs.run.cpu_offload,
            matrices=self._matrices,
        )
        scheduler = build_lr_scheduler(self.optimizer, inputs.config.optim, _NUM_STEPS)
        prepared = accelerator.prepare_optimizer(self.optimizer)
        self._state = TrainingState(accelerator, self.model, prepared, scheduler, inputs.sharded)
        tp_size = inputs.config.parallel.tp_size
        self._finish = StepFinish(self.model, inputs.sharded, _MAX_GRAD_NORM, tp_size=tp_size)

    def micro_step(self, batch: MicroBatch, weights: LossWeights, *, is_last: bool) -> None:
        """Run forward and backward; Accelerate counts the micro-steps itself."""
        reduce_across_groups(self.model, is_last=is_last)
        with self._accelerator.accumulate(self.model):
            run_micro_batch(self._state, batch, weights)

    def finish_gradients(self) -> None:
        """Sum over copies, and clip."""
        self._finish.finish_gradients()

    def update(self) -> None:
        """Update the weights and drop the gradients."""
        self._finish.update(self._state.optimizer, self._state.scheduler)


class Fsdp1Run:
    """What `train_fsdp1.py` does; as `Fsdp2Run`, but that `fill` wraps."""

    model: FullyShardedDataParallel
    optimizer: Optimizer

    def __init__(self, inputs: RehearsalInputs) -> None:
        self._inputs = inputs
        self.logits_map = inputs.find_logits_map()
        self._plugin = build_fsdp1_plugin(inputs.run.precision)

    def fill(self) -> None:
        """Fill and wrap layer by layer, and make the optimizer."""
        inputs = self._inputs
        self.model = fill_and_wrap_fsdp1(
            inputs.model,
            inputs.sharded,
            self._plugin,
            layer_classes=layer_classes(inputs.model),
            device=inputs.device,
            fill_local=fill_at_random,
        )
        named = ((strip_wrappers(name), p) for name, p in self.model.named_parameters())
        self.optimizer = build_optimizer(
            named,
            inputs.config.optim,
            inputs.run.precision,
            seed=_SEED,
            cpu_offload=inputs.run.cpu_offload,
        )
        self._scheduler = build_lr_scheduler(self.optimizer, inputs.config.optim, _NUM_STEPS)
        self._finish = StepFinish(self.model, inputs.sharded, _MAX_GRAD_NORM)

    def micro_step(self, batch: MicroBatch, weights: LossWeights, *, is_last: bool) -> None:
        """Run forward and backward; gradients wait where the options say so."""
        waits = not (is_last or self._inputs.run.sync_each_batch)
        with self.model.no_sync() if waits else nullcontext():
            loss = compute_micro_batch_loss(self.model, batch, weights, self._inputs.device)
            loss.objective.backward()

    def finish_gradients(self) -> None:
        """Sum over copies, and clip."""
        self._finish.finish_gradients()

    def update(self) -> None:
        """Update the weights and drop the gradients."""
        self._finish.update(self.optimizer, self._scheduler)


def move_to_meta(model: nn.Module) -> None:
    """Forget the adapters' values: they are filled like the weights, and booked.

    A parameter that is in two places stays in two places: tied embeddings stay tied.
    """
    on_meta: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in on_meta:
                values = parameter.detach().to("meta")
                on_meta[parameter] = nn.Parameter(values, parameter.requires_grad)
                if is_replicated(parameter):
                    mark_replicated(on_meta[parameter])
            setattr(module, name, on_meta[parameter])


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Return the classes that are an FSDP unit each, of those that the model has."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present.intersection(model._no_split_modules or ()))


def fill_at_random(_name: str, local: Tensor, _offsets: tuple[int, ...]) -> None:
    """Fill a part of a parameter."""
    local.normal_(std=0.02)
