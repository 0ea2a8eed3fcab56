"""Stages of a layer's experts, by the code that runs them.

`grouped_mm` and `triton` are this project's backends; where nothing of the experts is this
project's, transformers runs them with its own grouped_mm. `eager`, `scattermoe` and `megablocks`
are taken for `grouped_mm`: they keep the same rows between the same products.
"""

from megablocks_utils.config.backends import TRITON
from megablocks_utils.config.quantization import BLOCKS, count_unpacked
from megablocks_utils.planning.memory.exchange_stages import (
    combine_stage,
    dispatch_stage,
    join_stage,
    send_stage,
    sum_stage,
    take_stage,
)
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit
from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import DISPATCH, Stage

__all__ = ["expert_stages"]

# What a value takes until it is cast: in fp32 it, and the number that it is looked up by.
_UNPACKED_BYTES = {"nf4": 6, "int8": 4, "fp8": 8, "mxfp4": 6}
# What the scale of a block takes while it is made from its parts; others are stored as they are.
_SCALE_BYTES = {"nf4": 3 * FP32, "mxfp4": 2 * FP32}


def expert_stages(sizes: Sizes, unit: FsdpUnit) -> list[Stage]:
    """Return the stages from the routed tokens to their weighted sums.

    Args:
        sizes: of the run.
        unit: that holds the experts.
    """
    if not sizes.has_own_experts:
        return _transformers_stages(sizes)
    if sizes.run.kernel == TRITON.name:
        inside = [_triton_stage(sizes)]
    else:
        inside = [_gate_up_stage(sizes), _gate_stage(sizes), _down_stage(sizes)]
    if sizes.run.packed_format is not None and not _looks_up(sizes):
        inside = [_unpack_stage(sizes), *inside]
    stages = [_sort_stage(sizes, unit), *_with_exchange(sizes, inside)]
    return stages if sizes.run.tp_size == 1 else [take_stage(sizes), *stages, join_stage(sizes)]


def _with_exchange(sizes: Sizes, inside: list[Stage]) -> list[Stage]:
    """Put the way to the experts, and the way home, around what is computed there."""
    if sizes.sends_tokens:
        return [send_stage(sizes), *inside, sum_stage(sizes)]
    if sizes.rows_travel:
        return [dispatch_stage(sizes), *inside, combine_stage(sizes)]
    return [*inside, combine_stage(sizes)]


def _sort_stage(sizes: Sizes, unit: FsdpUnit) -> Stage:
    """Sort the routed rows; cast experts that FSDP does not gather in the dtype of compute."""
    has_copy = not unit.is_fsdp
    plain = (p for p in unit.shards if has_copy and p.packed_bytes is None)
    copies = sum(p.whole for p in plain if p.stored != sizes.compute) * sizes.compute
    saved = {"order of rows": 3 * sizes.num_routed * INDEX, "experts to compute with": copies}
    return Stage("order", DISPATCH, saved=saved, named=copies)


def _unpack_stage(sizes: Sizes) -> Stage:
    """Return what comes before the first product: both weights are made for use."""
    rows = sizes.received(sizes.shape.hidden_size)
    held = {"rows": rows * sizes.rows_travel, "rows as received": rows * _is_sorted_again(sizes)}
    return Stage("unpack", DISPATCH, forward=held | _unpacked_both(sizes))


def _gate_up_stage(sizes: Sizes) -> Stage:
    rows = sizes.received(sizes.shape.hidden_size)
    outputs, inner = 2 * sizes.received(sizes.expert_size), _inner(sizes)
    paths = 2 if inner else 1
    return Stage(
        "gate and up projections",
        DISPATCH,
        saved={"rows": rows * _saves_inputs(sizes), "between A and B": 2 * inner},
        forward=_lasting(sizes) | {"outputs": outputs * (2 if inner else 1)},
        backward=_dequantized(sizes, 2)
        | {
            "outputs' gradients": outputs,
            # While it unpacks, those of the adapter are there instead of the rows that it saved.
            "being unpacked, or rows' gradients": max(_being_unpacked(sizes, 2), paths * rows),
        },
        gradients=_gradients(sizes, sizes.shape.hidden_size, 2 * sizes.expert_size),
        named=rows * _saves_inputs(sizes),
    )


def _gate_stage(sizes: Sizes) -> Stage:
    inner = sizes.received(sizes.expert_size)
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
        sizes.received(sizes.expert_size),
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
            "being unpacked, or products' gradients": max(
                _being_unpacked(sizes, 1), products * (2 if inner else 1)
            ),
        },
        gradients=_gradients(sizes, sizes.expert_size, sizes.shape.hidden_size),
        named=products * saves,
    )


def _triton_stage(sizes: Sizes) -> Stage:
    """Return all of the fused kernels: gathered as they go, products computed again."""
    hidden_size, expert_size = sizes.shape.hidden_size, sizes.expert_size
    rows, products = sizes.received(hidden_size), sizes.received(expert_size)
    has_tokens = not sizes.rows_travel
    inputs, saves = sizes.expert_hidden_bytes if has_tokens else rows, _saves_inputs(sizes)
    return Stage(
        "fused experts",
        DISPATCH,
        saved={"rows": inputs * saves, "gate and up": 2 * products},
        forward=_held_weights(sizes)
        | {"rows": inputs * (not saves), "product": products, "outputs": rows},
        backward=_held_weights(sizes)
        | {
            "outputs' gradients": inputs,
            "of gate and up": 2 * products,
            "weighted products": products * saves,
            "rows' gradients": rows,
        },
        gradients=_gradients(sizes, hidden_size, 2 * expert_size)
        + _gradients(sizes, expert_size, hidden_size),
    )


def _transformers_stages(sizes: Sizes) -> list[Stage]:
    """Return what transformers' `grouped_mm_experts_forward` does, without adapters of experts."""
    hidden_size, expert_size = sizes.shape.hidden_size, sizes.expert_size
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
        "own tokens": sizes.expert_hidden_bytes * (sizes.run.tp_size > 1),
    }


def _dequantized(sizes: Sizes, num_matrices: int) -> dict[str, int]:
    """Return what is made of packed experts for use: of gate, up and down, as many as said."""
    if sizes.run.packed_format is None:
        return {}
    weights = sizes.num_local * sizes.shape.hidden_size * sizes.expert_size
    return {"dequantized": num_matrices * weights * sizes.compute}


def _looks_up(sizes: Sizes) -> bool:
    """Say whether the kernels take packed experts as they are."""
    return sizes.run.kernel == TRITON.name and sizes.run.packed_format in TRITON.unpacks


def _held_weights(sizes: Sizes) -> dict[str, int]:
    """Return what the fused kernels have of packed experts: numbers, or scales of one product's."""
    if not _looks_up(sizes):
        return _dequantized(sizes, 3)
    assert sizes.run.packed_format is not None, sizes
    _, block = BLOCKS[sizes.run.packed_format]
    weights = 2 * sizes.num_local * sizes.shape.hidden_size * sizes.expert_size
    return {"scales": weights // block * FP32}


def _being_unpacked(sizes: Sizes, num_matrices: int) -> int:
    """Return what unpacking one projection takes besides: down, or gate and up as one matrix."""
    name = sizes.run.packed_format
    if name is None:
        return 0
    at_a_time, (high, wide) = count_unpacked(sizes.run.device_type), BLOCKS[name]
    per_expert = num_matrices * sizes.shape.hidden_size * sizes.expert_size
    num_columns = sizes.shape.hidden_size if num_matrices == 2 else sizes.expert_size
    some = min(max(1, at_a_time // per_expert), sizes.num_local) * per_expert
    rows = max(1, at_a_time // (num_columns * high)) * high * num_columns
    numbers = (some if at_a_time >= per_expert else min(rows, per_expert)) * _UNPACKED_BYTES[name]
    if name not in _SCALE_BYTES:
        return numbers
    num_scales = sizes.num_local * per_expert // wide
    return max(num_scales * _SCALE_BYTES[name], num_scales * FP32 + numbers)


def _unpacked_both(sizes: Sizes) -> dict[str, int]:
    """Return the fuller moment of unpacking one projection after the other."""
    first = _dequantized(sizes, 2) | {"being unpacked": _being_unpacked(sizes, 2)}
    second = _dequantized(sizes, 3) | {"being unpacked": _being_unpacked(sizes, 1)}
    return max(first, second, key=lambda moment: sum(moment.values()))


def _is_sorted_again(sizes: Sizes) -> bool:
    """Say whether rows come in another order than that of the experts."""
    return sizes.rows_travel and sizes.num_local > 1 and not sizes.sends_tokens


def _inner(sizes: Sizes) -> int:
    """Return the rows between the two factors of an adapter; 0 without."""
    return sizes.received(sizes.run.lora_r) * sizes.run.trains_experts


def _gradients(sizes: Sizes, num_in: int, num_out: int) -> int:
    if sizes.trains_all:
        return sizes.num_local * num_in * num_out * sizes.compute
    rank = sizes.run.lora_r * sizes.run.trains_experts
    return sizes.num_local * rank * (num_in + num_out) * sizes.compute
