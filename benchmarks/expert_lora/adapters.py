"""The sides of the LoRA benchmark: adapters of our experts, and PEFT's own path.

PEFT adapts the concatenated experts of transformers with `target_parameters`: for each forward pass
it makes W + scaling * B @ A of all experts. Both sides hold the same weights and the same adapters,
with B not zero, and see the same inputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from megablocks_utils.lora.adapter_files import to_peft
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.shard_moe_utils import PROJECTIONS

RANK, ALPHA = 16, 32
OURS, PEFT = "ours", "peft"
_B_STD = 0.05


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        module: what holds the adapters.
        inputs: tensors whose gradients are compared; leaves of this side alone.
        forward: one forward pass on them.
        upstream: gradient of its output; None where that is a loss.
        optimizer: over the adapters; None where a step ends with the gradients.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    forward: Callable[[], Tensor]
    upstream: Tensor | None = None
    optimizer: Optimizer | None = None

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.module.parameters(), *self.inputs.values()):
            tensor.grad = None

    def step(self) -> Tensor:
        """Do the work once, from no gradients, and return the output."""
        self.clear()
        output = self.forward()
        output.backward(self.upstream)
        if self.optimizer is not None:
            self.optimizer.step()
        return output.detach()

    def constants(self) -> list[Tensor]:
        """Return what lives longer than a step."""
        return [*self.module.parameters(), *self.module.buffers(), *self.inputs.values()]

    def results(self) -> dict[str, Tensor]:
        """Do the work once and return the output and every gradient, adapters in PEFT's form."""
        output = {"output": self.step()}
        inputs = {f"gradient of {name}": tensor.grad for name, tensor in self.inputs.items()}
        return output | inputs | _adapter_gradients(self.module)


def adapters_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what is trained, with its names in the module."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def in_peft_form(adapters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return our adapters, or their gradients, under the names and in the form of PEFT's files."""
    return dict(to_peft(name, local_tensor(tensor)) for name, tensor in adapters)


def file_key(name: str) -> str:
    """Return the name that a parameter of a PEFT model has in PEFT's files."""
    return name.replace(".default.", ".")


@torch.no_grad()
def fill_b(module: nn.Module) -> None:
    """Make every B random: with the zeros they start with, A would have no gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapters_of(module):
        if ".lora_B" in name:
            local = local_tensor(parameter.detach())
            local.copy_(_B_STD * torch.randn(local.shape, generator=generator))


def build_lora_config(
    place: str, modules: list[str] | None = None, task_type: str | None = None
) -> LoraConfig:
    """Return PEFT's settings for adapters on experts in modules that end with `place`."""
    return LoraConfig(
        task_type=task_type,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules or [],
        target_parameters=[f"{place}.{name}" for name in PROJECTIONS],
    )


def _adapter_gradients(module: nn.Module) -> dict[str, Tensor]:
    gradients = [(name, p.grad) for name, p in adapters_of(module)]
    if isinstance(module, PeftModel):
        return {file_key(name): gradient for name, gradient in gradients}
    return in_peft_form(gradients)
