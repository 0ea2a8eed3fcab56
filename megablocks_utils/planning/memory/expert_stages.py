"""Stages of a layer's experts, by the code that runs them.

`grouped_mm` and `triton` are this project's backends; where nothing of the experts is this
project's, transformers runs them with its own grouped_mm. `eager`, `scattermoe` and `megablocks`
are taken for `grouped_mm`: they keep the same rows between the same products.
"""

from megablocks_utils.config.dispatch_cost import ROUTING_BYTES
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit
from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import DISPATCH, Stage

__all__ = ["expert_stages"]

_UNPACKED, _UNPACKED_BYTES = 2**22, 12  # values that are unpacked at a time; what each takes

_DOT_BLOCK = {"cpu": 2**17, "cuda": 2**26}
"""Elements that `kernels.permute` turns to fp32 at a time, for the routing weights' gradients."""


def expert_stages(sizes: Sizes, unit: FsdpUnit) -> list[Stage]:
    """Return the stages from the routed tokens to their weighted sums.

    Args:
        sizes: of the run.
        unit: that holds the experts.
    """
    if not sizes.has_own_experts:
        return _transformers_stages(sizes)
    if sizes.run.kernel == "triton":
        inside = [_triton_stage(sizes)]
    else:
        inside = [_gate_up_stage(sizes), _gate_stage(sizes), _down_stage(sizes)]
    stages = [_sort_stage(sizes, unit), *inside]
    if sizes.layout.ep_size > 1:
        if sizes.sends_tokens:
            return [*stages[:1], _send_stage(sizes), *inside, _sum_stage(sizes)]
        return [*stages[:1], _dispatch_stage(sizes), *inside, _combine_stage(sizes)]
    return [*stages, _combine_stage(sizes)]


def _sort_stage(sizes: Sizes, unit: FsdpUnit) -> Stage:
    """Sort the routed rows; cast experts that FSDP does not gather in the dtype of compute."""
    has_copy = not unit.is_fsdp
    plain = (p for p in unit.shards if has_copy and p.packed_bytes is None)
    copies = sum(p.whole for p in plain if p.stored != sizes.compute) * sizes.compute
    saved = {"order of rows": 3 * sizes.num_routed * INDEX, "experts to compute with": copies}
    return Stage("order", DISPATCH, saved=saved, named=copies)


def _dispatch_stage(sizes: Sizes) -> Stage:
    """Send rows to the ranks of their experts."""
    sent, received = sizes.routed(sizes.shape.hidden_size), sizes.received(sizes.shape.hidden_size)
    order = 2 * sizes.num_received * INDEX * (sizes.num_local > 1)
    sorted_again = received if sizes.num_local > 1 else sent
    return Stage(
        "dispatch",
        DISPATCH,
        saved={"order of received rows": order},
        forward={"rows sent": sent, "rows received": received},
        backward={"gradients received": received, "sorted, or sent back": sorted_again},
        kept=received,
    )


def _send_stage(sizes: Sizes) -> Stage:
    """Send tokens once to a rank, which makes the rows of its experts of them."""
    sent, came, rows = _sent(sizes), _came(sizes), sizes.received(sizes.shape.hidden_size)
    places = 2 * sizes.num_sent + sizes.tokens + 3 * sizes.num_received + sizes.num_came
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


def _gate_up_stage(sizes: Sizes) -> Stage:
    rows = sizes.received(sizes.shape.hidden_size)
    outputs, inner = 2 * sizes.received(sizes.shape.expert_size), _inner(sizes)
    paths = 2 if inner else 1
    return Stage(
        "gate and up projections",
        DISPATCH,
        saved={"rows": rows * _saves_inputs(sizes), "between A and B": 2 * inner},
        forward=_lasting(sizes) | {"outputs": outputs * (2 if inner else 1)},
        backward=_dequantized(sizes, 2)
        | {"outputs' gradients": outputs, "rows' gradients": paths * rows},
        gradients=_gradients(sizes, sizes.shape.hidden_size, 2 * sizes.shape.expert_size),
        named=rows * _saves_inputs(sizes),
    )


def _gate_stage(sizes: Sizes) -> Stage:
    inner = sizes.received(sizes.shape.expert_size)
    return Stage(
        "gate",
        DISPATCH,
        saved={"gate and up": 2 * inner},
        forward=_lasting(sizes) | {"product": inner},
        backward={"product's gradients": inner, "of gate and up": 2 * inner, "activation": inner},
    )


def _down_stage(sizes: Sizes) -> Stage:
    rows, products = (
        sizes.received(sizes.shape.hidden_size),
        sizes.received(sizes.shape.expert_size),
    )
    inner, saves = _inner(sizes), _saves_inputs(sizes)
    is_sorted_back = _is_sorted_again(sizes)
    return Stage(
        "down projection",
        DISPATCH,
        saved={"product": products * saves, "between A and B": 2 * inner},
        forward=_lasting(sizes)
        | {
            "product": products * (not saves),
            "outputs": rows * (2 if inner or is_sorted_back else 1),
        },
        backward=_dequantized(sizes, 1)
        | {
            "outputs' gradients": rows,
            "products' gradients": products * (2 if inner else 1),
        },
        gradients=_gradients(sizes, sizes.shape.expert_size, sizes.shape.hidden_size),
        named=products * saves,
    )


def _triton_stage(sizes: Sizes) -> Stage:
    """Return all of the fused kernels: gathered as they go, products computed again."""
    hidden_size, expert_size = sizes.shape.hidden_size, sizes.shape.expert_size
    rows, products = sizes.received(hidden_size), sizes.received(expert_size)
    has_tokens = sizes.layout.ep_size == 1
    inputs, saves = sizes.hidden_bytes if has_tokens else rows, _saves_inputs(sizes)
    return Stage(
        "fused experts",
        DISPATCH,
        saved={"rows": inputs * saves, "gate and up": 2 * products},
        forward=_dequantized(sizes, 3)
        | {"rows": inputs * (not saves), "product": products, "outputs": rows},
        backward=_dequantized(sizes, 3)
        | {
            "outputs' gradients": inputs,
            "of gate and up": 2 * products,
            "weighted products": products * saves,
            "rows' gradients": rows,
        },
        gradients=_gradients(sizes, hidden_size, 2 * expert_size)
        + _gradients(sizes, expert_size, hidden_size),
    )


def _combine_stage(sizes: Sizes) -> Stage:
    """Bring the results home, and sum them with their weights."""
    home, away = sizes.routed(sizes.shape.hidden_size), sizes.received(sizes.shape.hidden_size)
    if sizes.layout.ep_size == 1:
        if sizes.run.kernel == "triton":  # sums within its kernels, and keeps nothing for it
            return Stage("combine", DISPATCH, forward={"outputs": home, "sum": sizes.hidden_bytes})
        fullest, results = 2 * home + _dot_blocks(sizes), 0
    else:
        back = 2 * away if sizes.num_local > 1 else 0
        fullest, results = max(2 * home + _dot_blocks(sizes), home + away, back), away
    return Stage(
        "combine",
        DISPATCH,
        saved={"rows": home, "weights": sizes.num_routed * FP32},
        forward={"results": results, "sum": sizes.hidden_bytes},
        backward={"rows' gradients": fullest - home},
        kept=home,
    )


def _sum_stage(sizes: Sizes) -> Stage:
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


def _transformers_stages(sizes: Sizes) -> list[Stage]:
    """Return what transformers' `grouped_mm_experts_forward` does, without adapters of experts."""
    hidden_size, expert_size = sizes.shape.hidden_size, sizes.shape.expert_size
    rows, products = sizes.routed(hidden_size), sizes.routed(expert_size)
    weighted = rows // sizes.compute * FP32 if sizes.shape.routes_in_fp32 else rows
    saves = _saves_inputs(sizes)
    lasting = {"rows": rows * (not saves)}
    return [
        Stage(
            "gate and up projections",
            DISPATCH,
            saved={"rows": rows * saves, "order of rows": 4 * sizes.num_routed * INDEX},
            forward=lasting | {"outputs": 2 * products},
            backward={"outputs' gradients": 2 * products, "rows' gradients": rows},
            gradients=_gradients(sizes, hidden_size, 2 * expert_size),
            named=rows * saves,
        ),
        Stage(
            "gate",
            DISPATCH,
            saved={"gate and up": 2 * products, "activation": products},
            forward=lasting | {"product": products},
            backward={"gradients": 3 * products},
        ),
        Stage(
            "down projection",
            DISPATCH,
            saved={"product": products * saves},
            forward=lasting | {"product": products * (not saves), "outputs": rows},
            backward={"outputs' gradients": rows, "products' gradients": products},
            gradients=_gradients(sizes, expert_size, hidden_size),
        ),
        Stage(
            "combine",
            DISPATCH,
            saved={"rows": rows, "weights": sizes.num_routed * FP32},
            forward=lasting | {"weighted rows": 2 * weighted},
            backward={"gradients": 3 * weighted},
        ),
    ]


def _saves_inputs(sizes: Sizes) -> bool:
    """Say whether a projection's inputs are needed for the gradients of its weights or adapter."""
    return sizes.trains_all or sizes.run.trains_experts


def _lasting(sizes: Sizes) -> dict[str, int]:
    """Return what names of Python hold while the experts run, though autograd does not need it."""
    rows = sizes.received(sizes.shape.hidden_size)
    return _dequantized(sizes, 3) | {
        "rows as received": rows * _is_sorted_again(sizes),
        "rows": rows * (not _saves_inputs(sizes)),
    }


def _dequantized(sizes: Sizes, num_matrices: int) -> dict[str, int]:
    """Return what is made of packed experts for use: of gate, up and down, as many as said."""
    if sizes.run.packed_format is None:
        return {}
    weights = sizes.num_local * sizes.shape.hidden_size * sizes.shape.expert_size
    unpacked = min(_UNPACKED, weights) * _UNPACKED_BYTES
    return {"dequantized": num_matrices * weights * sizes.compute, "being unpacked": unpacked}


def _is_sorted_again(sizes: Sizes) -> bool:
    """Say whether rows come in another order than that of the experts."""
    return sizes.layout.ep_size > 1 and sizes.num_local > 1 and not sizes.sends_tokens


def _inner(sizes: Sizes) -> int:
    """Return the rows between the two factors of an adapter; 0 without."""
    return sizes.received(sizes.run.lora_r) * sizes.run.trains_experts


def _dot_blocks(sizes: Sizes) -> int:
    """Return a block's product of rows and their gradients in fp32, and copies of both in fp32.

    On a GPU one kernel makes the gradients of routing weights at home, without any.
    """
    run, at_home = sizes.run, not sizes.sends_tokens
    if (
        run.device_type == "cuda"
        and at_home
        and (run.kernel != "eager" or sizes.layout.ep_size > 1)
    ):
        return 0
    num_rows = sizes.num_routed if at_home else sizes.num_received
    elements = num_rows * sizes.shape.hidden_size
    return (1 + 2 * sizes.casts) * min(elements, _DOT_BLOCK[run.device_type]) * FP32


def _gradients(sizes: Sizes, num_in: int, num_out: int) -> int:
    if sizes.trains_all:
        return sizes.num_local * num_in * num_out * sizes.compute
    rank = sizes.run.lora_r * sizes.run.trains_experts
    return sizes.num_local * rank * (num_in + num_out) * sizes.compute
