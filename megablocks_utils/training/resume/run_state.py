"""What training changes, as shards for a checkpoint: weights, optimizer states, schedule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from megablocks_utils.checkpoint.distributed_checkpoint import (
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    read_shards,
    read_stored_tensors,
)
from megablocks_utils.checkpoint.tensor_shards import BlockPlace, TensorShard
from megablocks_utils.errors import CheckpointError
from megablocks_utils.fsdp.cpu_offload import choose_state_device
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.fsdp.places import PlacedParameters, find_buffers, find_places
from megablocks_utils.mesh.placement import local_tensor

__all__ = ["RunState"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = BlockPlace((1,), (0,))


@dataclass(frozen=True)
class RunState:
    """Hold what is trained and what trains it.

    Frozen weights are not part of it: they are read from the model again.

    Attributes:
        model: wrapped by FSDP1 or FSDP2.
        optimizer: over its trainable parameters, not in Accelerate's wrapper.
        scheduler: of the learning rate, a function of the step alone.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler

    def shards(self) -> dict[str, TensorShard]:
        """Return what this rank holds of every weight and state: views, nothing is copied."""
        shards, moments = self._buffer_shards(), self._list_moments()
        for name, (parameter, place) in find_places(self.model).items():
            shards[MODEL_PREFIX + name] = place.shard(local_tensor(parameter.detach()))
            state = self.optimizer.state.get(parameter, {})
            if not state:
                continue
            for moment in moments[id(parameter)]:
                shards[_state_key(name, moment)] = place.shard(local_tensor(state[moment]))
            shards[_state_key(name, "step")] = _STEP.shard(state["step"].detach().view(1))
        return shards

    def restore(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint written with any mesh and sharding.

        No communication: every rank reads what it holds.

        Args:
            folder: the checkpoint.
            step: optimizer steps done in it.

        Raises:
            CheckpointError: it does not hold just the trained parameters of this run.
        """
        stored = read_stored_tensors(folder)
        self._check_names(stored, folder)
        places = self.restore_weights(folder)
        self._restore_optimizer(folder, places, stored)
        # To the step before, and one on: this sets the learning rates too.
        position = {"last_epoch": step - 1, "_step_count": step + 1}
        self.scheduler.load_state_dict(self.scheduler.state_dict() | position)
        self.scheduler.step()

    def restore_weights(self, folder: Path) -> PlacedParameters:
        """Read weights and buffers of a checkpoint written with any mesh and sharding.

        No communication: every rank reads what it holds.

        Returns:
            Where this rank's parts of the parameters lie.

        Raises:
            CheckpointError: it lacks a tensor, or has it in another shape.
        """
        places = find_places(self.model)
        weights = {
            MODEL_PREFIX + name: place.shard(local_tensor(parameter.detach()))
            for name, (parameter, place) in places.items()
        }
        read_shards(weights | self._buffer_shards(), folder)
        return places

    def _buffer_shards(self) -> dict[str, TensorShard]:
        """Return the persistent buffers, whole; none beside adapters, whose base stays as it is."""
        if any("lora_A" in name for name, _ in self.model.named_parameters()):
            return {}
        # One without dims is stored with one.
        found = find_buffers(self.model)
        buffers = {name: b if b.dim() else b.view(1) for name, b in found.items()}
        return {
            MODEL_PREFIX + name: BlockPlace(tuple(b.shape), (0,) * b.dim()).shard(b)
            for name, b in buffers.items()
        }

    def _restore_optimizer(
        self, folder: Path, places: PlacedParameters, stored: Mapping[str, tuple]
    ) -> None:
        numbers = {
            id(parameter): number
            for number, parameter in enumerate(
                p for group in self.optimizer.param_groups for p in group["params"]
            )
        }
        states: dict[int, dict[str, Tensor]] = {}
        shards, moments = {}, self._list_moments()
        for name, (parameter, place) in places.items():
            if _state_key(name, "step") not in stored:
                continue
            state = states[numbers[id(parameter)]] = {"step": torch.zeros(1)}
            shards[_state_key(name, "step")] = _STEP.shard(state["step"])
            device = choose_state_device(self.optimizer, parameter)
            for moment in moments[id(parameter)]:
                key = _state_key(name, moment)
                _shape, dtype = stored[key]
                state[moment] = torch.zeros_like(parameter.detach(), dtype=dtype, device=device)
                shards[key] = place.shard(local_tensor(state[moment]))
        read_shards(shards, folder)
        for state in states.values():
            state["step"] = state["step"][0]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _list_moments(self) -> dict[int, tuple[str, ...]]:
        """Return the states that are as large as their parameter, by the parameter's id."""
        return {
            id(parameter): group.get("moments", _MOMENTS)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }

    def _check_names(self, stored: Mapping[str, tuple], folder: Path) -> None:
        """Refuse a checkpoint that lacks something, or holds something that nobody reads."""
        trained = dict(_trainable(self.model))
        wanted = set(trained)
        buffers = {name.removeprefix(MODEL_PREFIX) for name in self._buffer_shards()}
        found = {
            name.removeprefix(MODEL_PREFIX) for name in stored if name.startswith(MODEL_PREFIX)
        }
        held = wanted | buffers
        for names, cause in ((held - found, "lacks"), (found - held, "also holds")):
            if names:
                raise CheckpointError(
                    f"the checkpoint {folder} {cause} {min(names)}"
                    f" ({len(names)} of the parameters that this run trains)"
                )
        # A parameter without a gradient so far has no states.
        moments = self._list_moments()
        states = {
            name: {_state_key(name, state) for state in ("step", *moments[id(parameter)])}
            for name, parameter in trained.items()
        }
        begun = {key for keys in states.values() if not keys.isdisjoint(stored) for key in keys}
        others = {name for name in stored if not name.startswith(MODEL_PREFIX)}
        for names, cause in ((begun - others, "lacks"), (others - begun, "also holds")):
            if names:
                raise CheckpointError(
                    f"the checkpoint {folder} {cause} {min(names)}"
                    f" ({len(names)} of the optimizer's states)"
                )


def _state_key(name: str, state: str) -> str:
    return f"{OPTIMIZER_PREFIX}{name}.{state}"


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield strip_wrappers(name), parameter
