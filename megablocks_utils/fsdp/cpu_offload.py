"""What `--cpu_offload` moves to host memory: FSDP2's shards, or an optimizer's states.

On a machine without GPUs nothing moves, by the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.optim import Optimizer

from megablocks_utils.mesh.placement import local_tensor

__all__ = [
    "HostStates",
    "build_offload_policy",
    "choose_state_device",
]


def build_offload_policy(cpu_offload: str, device_type: str) -> OffloadPolicy:
    """Build FSDP2's policy: `params` keeps shards, their gradients and states in host memory."""
    if cpu_offload != "params":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device_type != "cpu")


class HostStates(Optimizer):
    """Keep an optimizer's states in host memory, and bring them to the device for an update.

    A mixin: it goes before an optimizer's class. The update itself is that optimizer's, on the same
    device, so its results are the same to the bit. It is made for some parameters at a time: at
    most the states of the largest one, or of as many elements, are on the device. The number of a
    parameter's steps stays where the optimizer has it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Raises:
            RuntimeError: for a closure: it would be called once for each part of the parameters.
        """
        if closure is not None:
            raise RuntimeError("an optimizer with its states in host memory takes no closure")
        for part in self._parts():
            chosen = [parameter for parameter in part if parameter.grad is not None]
            if not chosen:
                continue
            with self._only(chosen):
                hosts = self._bring_to_device(chosen)
                super().step()
                self._put_back(chosen, hosts)
        self._wait_for_copies()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whose tensors go to the device for some parameters at a time."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [id(parameter) for group in self.param_groups for parameter in group["params"]]
        number_of = dict(zip(own, numbers, strict=True))
        saved = state_dict["state"]
        loaded: dict[Tensor, Any] = {}
        for part in list(self._parts()):
            wanted = (number_of[id(parameter)] for parameter in part)
            states = {number: saved[number] for number in wanted if number in saved}
            super().load_state_dict(state_dict | {"state": states})
            self._put_back(part, {})
            loaded |= self.state
        self.state.update(loaded)
        self._wait_for_copies()

    def _parts(self) -> Iterator[Sequence[Tensor]]:
        """Yield the parameters of each group in turn, no more at a time than the largest has."""
        groups = [list(group["params"]) for group in self.param_groups]
        largest = max((local_tensor(p.detach()).numel() for g in groups for p in g), default=0)
        for parameters in groups:
            part: list[Tensor] = []
            room = largest
            for parameter in parameters:
                size = local_tensor(parameter.detach()).numel()
                if size > room:
                    yield part
                    part, room = [], largest
                part.append(parameter)
                room -= size
            if part:
                yield part

    @contextmanager
    def _only(self, chosen: Sequence[Tensor]) -> Iterator[None]:
        """Let the optimizer see only these parameters, while entered."""
        kept, wanted = [group["params"] for group in self.param_groups], set(map(id, chosen))
        try:
            for group, parameters in zip(self.param_groups, kept, strict=True):
                group["params"] = [p for p in parameters if id(p) in wanted]
            yield
        finally:
            for group, parameters in zip(self.param_groups, kept, strict=True):
                group["params"] = parameters

    def _bring_to_device(self, parameters: Sequence[Tensor]) -> dict[tuple[int, str], Tensor]:
        """Put copies on the device in the states' place; returns what lies in host memory."""
        hosts = {}
        for parameter in parameters:
            state = self.state.get(parameter, {})
            for name, host in _moments(state).items():
                hosts[id(parameter), name] = host
                state[name] = host.to(parameter.device, non_blocking=True)
        return hosts

    def _put_back(
        self, parameters: Sequence[Tensor], hosts: Mapping[tuple[int, str], Tensor]
    ) -> None:
        for parameter in parameters:
            state = self.state.get(parameter, {})
            for name, value in _moments(state).items():
                host = hosts.get((id(parameter), name))
                if host is None:
                    host = _make_host_tensor(value)
                if host is not value:
                    local_tensor(host).copy_(local_tensor(value), non_blocking=True)
                state[name] = host

    def _wait_for_copies(self) -> None:
        """Wait until what is copied to host memory has arrived: a checkpoint may read it next."""
        parameters = (p for group in self.param_groups for p in group["params"])
        if any(parameter.device.type != "cpu" for parameter in parameters):
            torch.accelerator.current_stream().synchronize()


def choose_state_device(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Return where an optimizer keeps a parameter's states between two updates."""
    return torch.device("cpu") if isinstance(optimizer, HostStates) else parameter.device


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the states that are as large as their parameter, by name."""
    return {name: s for name, s in state.items() if isinstance(s, Tensor) and s.dim() > 0}


def _make_host_tensor(value: Tensor) -> Tensor:
    """Return memory of the host for a state; itself, where it lies there."""
    if value.device.type == "cpu":
        return value
    return torch.empty_like(value, device="cpu", pin_memory=True)
