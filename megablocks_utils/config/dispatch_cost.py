"""What a token costs on its way to its experts: once an expert, or once a rank. Torch-free."""

from dataclasses import dataclass
from math import comb

from megablocks_utils.config.backends import AUTO
from megablocks_utils.errors import ConfigurationError

__all__ = ["DISPATCH_CHOICES", "ROWS", "ROW_DISPATCH", "TOKENS", "DispatchChoice", "TokenTraffic"]

ROWS, TOKENS = "rows", "tokens"
DISPATCH_CHOICES = (AUTO, ROWS, TOKENS)

ROUTING_BYTES, WEIGHT_GRADIENT_BYTES = 8, 4
"""Of a routed row, where tokens travel once a rank: its place and weight, the weight's gradient."""

_LEAST_SAVING = 0.05
"""Share of the bytes that `tokens` must save: its sums need a few small operations more."""


@dataclass(frozen=True)
class TokenTraffic:
    """A layer whose E experts lie on P ranks, each token having K, any K as likely as others.

    Attributes:
        num_experts: E.
        top_k: K.
        ep_size: P.
        hidden_bytes: of a token's hidden state, in the dtype of compute.
    """

    num_experts: int
    top_k: int
    ep_size: int
    hidden_bytes: int

    @property
    def ranks_per_token(self) -> float:
        """Ranks that have at least one of a token's experts, on average."""
        elsewhere = self.num_experts - self.num_experts // self.ep_size
        return self.ep_size * (1 - comb(elsewhere, self.top_k) / comb(self.num_experts, self.top_k))

    def count_copies(self, tokens: int) -> int:
        """Return how many copies of a rank's tokens go to ranks, itself among them."""
        return round(tokens * self.ranks_per_token)

    @property
    def row_bytes(self) -> float:
        """Bytes that leave a rank for a token that travels once an expert, both passes."""
        return 4 * self._away(self.top_k) * self.hidden_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes that leave a rank for a token that travels once a rank, both passes."""
        routing = self._away(self.top_k) * (ROUTING_BYTES + WEIGHT_GRADIENT_BYTES)
        return 4 * self._away(self.ranks_per_token) * self.hidden_bytes + routing

    def _away(self, count: float) -> float:
        """Return what is not for this rank itself."""
        return count * (self.ep_size - 1) / self.ep_size


@dataclass(frozen=True)
class DispatchChoice:
    """How tokens travel, `rows` or `tokens`, and why."""

    name: str
    reason: str

    @property
    def is_once_per_rank(self) -> bool:
        """Whether a token travels once to each rank that has experts of it."""
        return self.name == TOKENS


ROW_DISPATCH = DispatchChoice(ROWS, "nothing else was chosen")


def choose_dispatch(
    wanted: str, traffic: TokenTraffic | None, unsupported_reason: str | None
) -> DispatchChoice:
    """Choose what is fewer bytes, or what is asked for.

    Args:
        wanted: `auto`, `rows` or `tokens`.
        traffic: of the layer; None where its top_k is not known.
        unsupported_reason: why tokens cannot travel once a rank, in a clause; None where they can.

    Raises:
        ConfigurationError: `tokens`, where that cannot be.
    """
    if wanted == TOKENS and unsupported_reason is not None:
        raise ConfigurationError(
            f"token_dispatch is {TOKENS}, but {unsupported_reason}; it must be {AUTO} or {ROWS}.",
            parameters=("token_dispatch",),
        )
    if wanted != AUTO:
        return DispatchChoice(wanted, "as asked for")
    if unsupported_reason is not None:
        return DispatchChoice(ROWS, unsupported_reason)
    if traffic is None:
        return DispatchChoice(ROWS, "the model does not say how many experts a token has")
    if traffic.ep_size == 1:
        return DispatchChoice(ROWS, "no token leaves its rank")
    name = TOKENS if traffic.token_bytes < (1 - _LEAST_SAVING) * traffic.row_bytes else ROWS
    return DispatchChoice(
        name,
        f"a token sends {traffic.token_bytes:,.0f} bytes a layer as {TOKENS}, "
        f"{traffic.row_bytes:,.0f} as {ROWS}",
    )
