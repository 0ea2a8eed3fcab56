"""Stages of tokens on their way to the experts of other ranks, and of results on their way home."""

from megablocks_utils.config.dispatch_cost import ROUTING_BYTES
from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import DISPATCH, Stage

__all__ = ["combine_stage", "dispatch_stage", "join_stage", "send_stage", "sum_stage", "take_stage"]

_DOT_BLOCK = {"cpu": 2**17, "cuda": 2**26}
"""Elements that `kernels.permute` turns to fp32 at a time, for the routing weights' gradients."""


def take_stage(sizes: Sizes) -> Stage:
    """Take this rank's part of the tokens that all ranks of a tp group have."""
    part = sizes.expert_hidden_bytes
    return Stage(
        "own tokens",
        DISPATCH,
        forward={"own tokens": part},
        backward={"whole gradients": sizes.hidden_bytes, "own": part},
    )


def join_stage(sizes: Sizes) -> Stage:
    """Gather the results of the tokens of all ranks of a tp group."""
    part = sizes.expert_hidden_bytes
    return Stage(
        "tokens of all",
        DISPATCH,
        forward={"own": 2 * part, "of all": sizes.hidden_bytes},
        backward={"own gradients": part},
    )


def dispatch_stage(sizes: Sizes) -> Stage:
    """Send rows to the ranks of their experts."""
    sent, received = sizes.routed(sizes.shape.hidden_size), sizes.received(sizes.shape.hidden_size)
    order = 2 * sizes.num_received * INDEX * (sizes.num_local > 1)
    fullest = received if sizes.num_local > 1 else sent
    forward = {"rows sent": sent, "rows received": received}
    if sizes.run.expert_tp_size > 1:
        forward |= {"rows brought": _brought(sizes), "rows for all slices": received}
        fullest = max(fullest, received + _sums(sizes), _brought(sizes) + sent)
    return Stage(
        "dispatch",
        DISPATCH,
        saved={"order of received rows": order},
        forward=forward,
        backward={"gradients received": received, "sorted, or summed and sent back": fullest},
        kept=received,
    )


def _brought(sizes: Sizes) -> int:
    """M rows in the dtype of compute; none where the ep axis brings nothing."""
    if sizes.layout.ep_size == 1:
        return 0
    return sizes.num_brought * sizes.shape.hidden_size * sizes.compute


def _sums(sizes: Sizes) -> int:
    """M sums of what the slices made of a row, in fp32 and in the dtype of compute."""
    width = FP32 + sizes.compute * sizes.casts
    return sizes.num_brought * sizes.shape.hidden_size * width


def send_stage(sizes: Sizes) -> Stage:
    """Send tokens once to a rank, which makes the rows of its experts of them."""
    sent, came, rows = _sent(sizes), _came(sizes), sizes.received(sizes.shape.hidden_size)
    places = 2 * sizes.num_sent + sizes.run.expert_tokens + 3 * sizes.num_received + sizes.num_came
    return Stage(
        "dispatch",
        DISPATCH,
        saved={"order of copies and received rows": places * INDEX},
        forward={"tokens": came, "sent, or rows of them": max(sent, rows)},
        backward={"tokens' gradients": came, "rows' gradients, or sent back": max(sent, rows)},
        kept=came + sizes.num_received * ROUTING_BYTES,
    )


def _sent(sizes: Sizes) -> int:
    """S copies of tokens in the dtype of compute."""
    return sizes.num_sent * sizes.shape.hidden_size * sizes.compute


def _came(sizes: Sizes) -> int:
    """G received tokens in the dtype of compute."""
    return sizes.num_came * sizes.shape.hidden_size * sizes.compute


def combine_stage(sizes: Sizes) -> Stage:
    """Bring the results home, and sum them with their weights."""
    home, away = sizes.routed(sizes.shape.hidden_size), sizes.received(sizes.shape.hidden_size)
    if not sizes.rows_travel:
        if sizes.run.kernel == "triton":  # sums within its kernels, and keeps nothing for it
            return Stage(
                "combine", DISPATCH, forward={"outputs": home, "sum": sizes.expert_hidden_bytes}
            )
        fullest, results = 2 * home + _dot_blocks(sizes), 0
    else:
        back = 2 * away if sizes.num_local > 1 else 0
        gathered = home + away
        results = away
        if sizes.run.expert_tp_size > 1:
            gathered += _brought(sizes) + away
            results = max(2 * away + _sums(sizes), away + _brought(sizes) + home) - home
        fullest = max(2 * home + _dot_blocks(sizes), gathered, back)
    return Stage(
        "combine",
        DISPATCH,
        saved={"rows": home, "weights": sizes.num_routed * FP32},
        forward={"results": results, "sum": sizes.expert_hidden_bytes},
        backward={"rows' gradients": fullest - home},
        kept=home,
    )


def sum_stage(sizes: Sizes) -> Stage:
    """Weight and sum the rows of each token, bring the sums home, and sum them."""
    sent, came, rows = _sent(sizes), _came(sizes), sizes.received(sizes.shape.hidden_size)
    return Stage(
        "combine",
        DISPATCH,
        saved={"rows": rows, "weights": sizes.num_received * FP32},
        forward={"sums": came, "sums at home": sent},
        backward={"sums' gradients": came, "rows'": max(sent, rows + _dot_blocks(sizes))},
        kept=sent,
    )


def _dot_blocks(sizes: Sizes) -> int:
    """Return a block's product of rows and their gradients in fp32, and copies of both in fp32.

    On a GPU one kernel makes the gradients of routing weights, without any.
    """
    run = sizes.run
    if run.device_type == "cuda" and (run.kernel != "eager" or sizes.rows_travel):
        return 0
    num_rows = sizes.num_received if sizes.sends_tokens else sizes.num_routed
    elements = num_rows * sizes.shape.hidden_size
    return (1 + 2 * sizes.casts) * min(elements, _DOT_BLOCK[run.device_type]) * FP32
