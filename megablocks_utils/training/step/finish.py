"""The end of an optimizer step: gradients, update, checks. Both loops and the rehearsal use it."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from megablocks_utils.fsdp.expert_units import shards_over_dp
from megablocks_utils.fsdp.gradients import (
    clip_gradients,
    shard_grad_norms,
    sum_peer_gradients,
    sum_replica_gradients,
    sum_replicated_gradients,
)
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.training.step.debug import check_replicas
from megablocks_utils.training.step.finite import FiniteCheck
from megablocks_utils.training.step.router_balance import RouterBalance

__all__ = ["StepFinish"]


@dataclass(frozen=True)
class StepFinish:
    """Finish optimizer steps once their micro-batches have left gradients.

    Call the four methods in their order. Hugging Face's Trainer makes the update itself, in the
    order of `update`, so that its own hooks are called around it.

    Attributes:
        model: wrapped by FSDP1 or FSDP2.
        sharded: how its experts are split; None where transformers runs them.
        max_grad_norm: global norm that gradients are clipped to; 0 means no clipping.
        is_debug_run: whether every step checks that replicas are equal.
        finite: told of the gradients; None: nobody looks at them.
        balance: moves the routers' correction biases; None: they stay.
        tp_size: ranks of a tp group, which have the same rows.
    """

    model: nn.Module
    sharded: ShardedMoE | None
    max_grad_norm: float
    is_debug_run: bool = False
    finite: FiniteCheck | None = None
    balance: RouterBalance | None = None
    tp_size: int = 1

    def finish_gradients(self) -> Tensor:
        """Sum what FSDP does not sum over replicas, clip all, and return the norm before clipping.

        **Collective:** every rank of the world must call; see `fsdp.gradients`.
        """
        # FSDP2 has summed over dp what it shards over dp.
        if self.sharded is not None:
            experts = self.sharded.expert_parameters.values()
            if not shards_over_dp(self.sharded):
                sum_replica_gradients(experts, self.sharded.mesh)
            sum_peer_gradients(experts, self.sharded.mesh)
        trainable = self._trainable()
        sum_replicated_gradients(trainable, self.tp_size)
        norms = shard_grad_norms(trainable)
        if self.finite is not None:
            self.finite.take_gradients(trainable, norms)
        return clip_gradients(trainable, self.max_grad_norm, norms)

    def update(self, optimizer: Optimizer, scheduler: LRScheduler) -> float:
        """Update the weights, set the next learning rate and drop the gradients.

        Returns:
            The learning rate of this update.
        """
        learning_rate = float(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return learning_rate

    def balance_experts(self) -> None:
        """Move the routers' correction biases, after the update.

        **Collective:** where they move, every rank of the world must call.
        """
        if self.balance is not None:
            self.balance.update()

    def check_weights(self, step: int) -> None:
        """Check in a debug run that the replicas of every parameter are equal.

        **Collective:** in a debug run as `check_replicas`, which raises what this raises.
        """
        if self.is_debug_run:
            check_replicas(self.model, self.sharded, step)

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
