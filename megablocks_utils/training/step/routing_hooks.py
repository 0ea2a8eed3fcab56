"""What follows the routing of a run's micro-batches: balancing, and the loads of experts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.expert_loads import ExpertLoads
from megablocks_utils.training.step.router_balance import RouterBalance

__all__ = ["NO_ROUTING_HOOKS", "RoutingHooks"]


@dataclass(frozen=True)
class RoutingHooks:
    """Hold what counts the tokens of every expert.

    Attributes:
        balance: moves the routers' correction biases; None where they stay.
        loads: measures the experts' loads; None where nobody asks for them.
    """

    balance: RouterBalance | None = None
    loads: ExpertLoads | None = None

    @contextmanager
    def counting(self, batch: MicroBatch) -> Iterator[None]:
        """Count what is routed while entered; see `RoutingCounts.counting`."""
        with ExitStack() as stack:
            for user in (self.balance, self.loads):
                if user is not None:
                    stack.enter_context(user.routing.counting(batch))
            yield


NO_ROUTING_HOOKS = RoutingHooks()
"""Nothing is counted."""
