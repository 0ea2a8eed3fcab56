"""Values that are not finite: seen in numbers that leave the device once a step, then named.

Nothing waits for the device before the step's own metrics do. Only when they are not finite is it
looked up which tensor was the first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from megablocks_utils.checkpoint.tensor_shards import TensorShard
from megablocks_utils.errors import NonFiniteError
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.fsdp.gradients import map_by_device
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.agreement import gather_from_all_ranks
from megablocks_utils.training.report.metrics import StepMetrics

__all__ = ["FiniteCheck", "Shards", "check_shards", "largest_values"]

Shards = Mapping[str, TensorShard]
"""What this rank holds of tensors, by their names."""

_CPU_ELEMENTS = 2**22
"""Weights that a CPU looks at in one step: some milliseconds."""
_RISKY_RATE = 1.0
"""Update of a weight, over its size or 1, below which finite gradients leave weights finite."""
_CONTINUE = "--stop_on_nonfinite False continues"


class FiniteCheck:
    """Look at the gradients and weights of every step, and end the run where they are not finite.

    Args:
        model: wrapped by FSDP1 or FSDP2.
        warn: shows a line; None: the run ends instead.
    """

    def __init__(self, model: nn.Module, warn: Callable[[str], None] | None = None) -> None:
        self._model = model
        self._warn = warn
        self._parameters: Sequence[Tensor] = ()
        self._gradients: list[int] = []
        self._weights: list[int] = []
        self._next_weight = 0
        self._gradient_norms = self._largest_weights = torch.zeros(0)

    def take_gradients(self, parameters: Sequence[Tensor], norms: Tensor) -> None:
        """Keep what a step's gradients are known by.

        Args:
            parameters: the trained ones, in the model's order.
            norms: (G,) of this rank's shard of each gradient there is.
        """
        self._parameters, numbered = parameters, enumerate(parameters)
        self._gradients = [number for number, p in numbered if p.grad is not None]
        self._gradient_norms = norms

    def count_weights(self, *, is_last: bool, rate: float) -> Tensor:
        """Return how many trained weights are not finite here after the update, on the device.

        Adam moves a weight by a few learning rates at most, so finite gradients leave it finite
        at every sensible rate. What else may have spoilt weights is looked for all the same: on a
        GPU in all of them, on a CPU, where that takes longer, in a share of a large model's, and in
        all of them after the last step and (`check_shards`) before every save.

        Args:
            is_last: whether the run ends with this step.
            rate: learning rate of this step, times 1 or the weight decay where that is more.
        """
        weights = [local_tensor(parameter.detach()) for parameter in self._parameters]
        must_see_all = is_last or rate > _RISKY_RATE
        self._weights = list(range(len(weights))) if must_see_all else self._choose(weights)
        self._largest_weights = largest_values([weights[number] for number in self._weights])
        return (~self._largest_weights.isfinite()).sum()

    def _choose(self, weights: Sequence[Tensor]) -> list[int]:
        """Return the numbers of all weights on a GPU, and of the next ones in turn on the CPU."""
        on_cpu = [number for number, weight in enumerate(weights) if not weight.is_cuda]
        share: list[int] = []
        num_elements = 0
        while len(share) < len(on_cpu) and num_elements < _CPU_ELEMENTS:
            share.append(on_cpu[(self._next_weight + len(share)) % len(on_cpu)])
            num_elements += weights[share[-1]].numel()
        self._next_weight = (self._next_weight + len(share)) % max(1, len(on_cpu))
        return [number for number, weight in enumerate(weights) if weight.is_cuda] + share

    def conclude(self, metrics: StepMetrics, num_weights: int) -> None:
        """End the run, or warn, if a step has left values that are not finite.

        **Collective:** one all-gather, in a step with such values only.

        Args:
            metrics: of the step.
            num_weights: what `count_weights` gives, summed over the ranks.

        Raises:
            NonFiniteError: on every rank, naming the step and the first such tensor.
        """
        numbers = (metrics.loss, metrics.grad_norm)
        if num_weights == 0 and all(map(math.isfinite, numbers)):
            return
        sentence = f"step {metrics.step} of this run: {self._describe()}"
        sentence += f" (the loss is {metrics.loss:.6g}, the gradient norm {metrics.grad_norm:.6g})"
        if self._warn is None:
            raise NonFiniteError(
                f"{sentence}; nothing of this step is saved and earlier checkpoints are kept. "
                f"A lower --learning_rate or other data may help; {_CONTINUE}."
            )
        self._warn(f"{sentence}; the run continues, since --stop_on_nonfinite is False")

    def _describe(self) -> str:
        """Name the first tensor that is not finite on any rank, gradients first."""
        found = gather_from_all_ranks(self._find_local)
        named = self._model.named_parameters()
        names = [strip_wrappers(name) for name, parameter in named if parameter.requires_grad]
        for kind, ranks in zip(("gradient", "weight"), zip(*found, strict=True), strict=True):
            if numbers := sorted({number for of_rank in ranks for number in of_rank}):
                first = f"the {kind} {names[numbers[0]]} is not finite"
                return first if len(numbers) == 1 else f"{first}, nor are {len(numbers) - 1} others"
        return "the loss is not finite"

    def _find_local(self) -> tuple[list[int], list[int]]:
        gradients = [self._gradients[number] for number in _find_nonfinite(self._gradient_norms)]
        weights = [self._weights[number] for number in _find_nonfinite(self._largest_weights)]
        return gradients, weights


def check_shards(shards: Shards, place: str) -> None:
    """Refuse tensors of a checkpoint that are not finite.

    Args:
        shards: what this rank holds of them, by name.
        place: the checkpoint, for the message.

    Raises:
        NonFiniteError: naming the first of them.
    """
    for name, shard in shards.items():
        tensors = [block.tensor for block in shard.blocks]
        if _find_nonfinite(largest_values(tensors)):
            raise NonFiniteError(f"{place}: the tensor {name} is not finite; {_CONTINUE}.")


def largest_values(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value of each tensor, (N,) fp32; NaN where there is one."""
    # An empty one has no largest value; a zero stands for it.
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    return map_by_device(tensors, _largest_on_device)


def _largest_on_device(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cuda:
        norms: Iterable[Tensor] = torch._foreach_norm(tensors, math.inf, dtype=torch.float32)
        return torch.stack(tuple(norms))
    # On a CPU several times as fast as a norm.
    lowest, highest = zip(*(torch.aminmax(tensor) for tensor in tensors), strict=True)
    return torch.maximum(-torch.stack(lowest), torch.stack(highest)).float()


def _find_nonfinite(values: Tensor) -> list[int]:
    return (~values.isfinite()).nonzero().flatten().tolist()
