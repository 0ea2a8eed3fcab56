"""Run the model on one micro-batch and weigh its loss: the same for both entry points."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megablocks_utils.mesh.sequence_exchange import SequenceGroup
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.aux_loss import AuxLoss
from megablocks_utils.training.step.forward import run_loss
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap
from megablocks_utils.training.step.routing_hooks import NO_ROUTING_HOOKS, RoutingHooks


@dataclass(frozen=True)
class LossWeights:
    """What the losses of a micro-batch count in its step.

    Attributes:
        num_label_tokens: label tokens of the whole global batch.
        num_micro_batches: micro-batches with examples of the whole global batch.
        aux_loss_coef: weight of the load-balancing loss; 0 leaves it out.
        aux_loss: where that loss comes from.
        logits_map: what the model does to its head's logits; None: the loss takes them all at once.
        sequence: the ranks that share this rank's rows; None: it has them whole.
    """

    num_label_tokens: int
    num_micro_batches: int
    aux_loss_coef: float = 0.0
    aux_loss: AuxLoss = AuxLoss()
    logits_map: LogitsMap | None = None
    sequence: SequenceGroup | None = None


@dataclass(frozen=True)
class MicroBatchLoss:
    """Losses of one micro-batch, scalars on the device.

    Attributes:
        objective: what to differentiate; its sum over all ranks and micro-steps is the step loss
            (plus the weighted auxiliary loss).
        token_loss_sum: sum of the token losses, detached.
        aux_loss: load-balancing loss before its coefficient, detached; None where left out.
        aux_share: how much of a micro-batch's it is; less than all where ranks share rows.
    """

    objective: Tensor
    token_loss_sum: Tensor
    aux_loss: Tensor | None
    aux_share: float = 1.0


def compute_micro_batch_loss(
    model: nn.Module,
    batch: MicroBatch,
    weights: LossWeights,
    device: torch.device,
    routing: RoutingHooks = NO_ROUTING_HOOKS,
) -> MicroBatchLoss:
    """Run the forward pass on a micro-batch.

    The auxiliary loss is that of this micro-batch's tokens; a step takes the mean over its
    micro-batches. A dummy takes part in every exchange and counts nothing.
    """
    has_aux_loss = weights.aux_loss_coef > 0
    with routing.counting(batch):
        outputs, loss_sum = run_loss(
            model, batch, device, weights.logits_map, router_logits=has_aux_loss
        )
    objective = loss_sum / weights.num_label_tokens
    if not has_aux_loss:
        return MicroBatchLoss(objective, loss_sum.detach(), None)
    share = 0.0 if batch.is_dummy else weights.aux_loss_coef / weights.num_micro_batches
    aux_loss = weights.aux_loss.of(outputs, batch, weights.sequence)
    shown = None if batch.is_dummy else aux_loss.detach()
    aux_share = 1.0 if weights.sequence is None else 1 / weights.sequence.size
    return MicroBatchLoss(objective + share * aux_loss, loss_sum.detach(), shown, aux_share)
