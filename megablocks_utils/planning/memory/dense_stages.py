"""Stages of a layer outside of its experts: norms, attention, router, dense MLPs."""

from collections.abc import Iterable

from megablocks_utils.planning.memory.sizes import FP32, INDEX, Sizes
from megablocks_utils.planning.memory.stages import Stage

__all__ = ["attention_stages", "exchanged_bytes", "mlp_stage", "norm_stage", "output_bytes"]
__all__ += ["router_stage"]

_OUTPUT = "o_proj"


def norm_stage(sizes: Sizes, name: str, *, owns_input: bool) -> Stage:
    """Return an RMS norm of the hidden states, computed in fp32.

    Args:
        sizes: of the run.
        name: of the norm.
        owns_input: whether it alone keeps its input, where that is fp32 already.
    """
    is_trained = sizes.trains_all
    saved = {
        "1 / root mean square": sizes.tokens * FP32,
        "input in fp32": sizes.hidden_fp32_bytes * (sizes.casts or owns_input),
        "normalised input": sizes.hidden_bytes * is_trained,
    }
    forward = {
        "normalised input in fp32": sizes.hidden_fp32_bytes,
        "normalised input": sizes.hidden_bytes * (sizes.casts and not is_trained),
        "output": sizes.hidden_bytes,
    }
    # When most is held, the normalised input is gone.
    backward = {"gradients in fp32": (4 + sizes.casts) * sizes.hidden_fp32_bytes}
    backward["normalised input"] = -sizes.hidden_bytes * is_trained
    gradients = sizes.shape.hidden_size * sizes.compute * is_trained
    return Stage(name, saved=saved, forward=forward, backward=backward, gradients=gradients)


def attention_stages(sizes: Sizes) -> list[Stage]:
    """Return attention, from the normalised hidden states to its output."""
    inside = [_core_stage(sizes)]
    if sizes.run.sp_size > 1:
        inside = [_to_heads_stage(sizes), *inside, _to_tokens_stage(sizes)]
    if sizes.attention.kv_rank:
        return [*_latent_projection_stages(sizes), *inside, _output_stage(sizes)]
    stages = [_projection_stage(sizes), _rotary_stage(sizes)]
    if sizes.attention.qk_norm != "none":
        stages.insert(1, _qk_norm_stage(sizes))
    return [*stages, *inside, _output_stage(sizes)]


def router_stage(sizes: Sizes) -> Stage:
    """Return the router: logits, probabilities in fp32, and which experts a token goes to."""
    logits = sizes.tokens * sizes.shape.num_experts
    return Stage(
        "router",
        saved={
            "input": sizes.hidden_bytes * sizes.trains_all,
            "probabilities": logits * FP32,
            "logits for the auxiliary loss": logits * sizes.compute * sizes.run.has_aux_loss,
            "top k": sizes.tokens * sizes.shape.top_k * (2 * INDEX + 2 * FP32),
        },
        forward={"logits": logits * (sizes.compute + FP32)},
        backward={"gradients": 2 * logits * FP32 + 2 * sizes.hidden_bytes},
        gradients=sizes.shape.num_experts
        * sizes.shape.hidden_size
        * sizes.compute
        * sizes.trains_all,
    )


def mlp_stage(sizes: Sizes, name: str, size: int, *, owns_input: bool) -> Stage:
    """Return a gated MLP that every token passes."""
    inner, has_adapters = sizes.tokens * size * sizes.compute, sizes.run.trains_dense
    low_rank = sizes.tokens * sizes.run.lora_r * sizes.compute * has_adapters
    weights, hidden_size = 3 * size * sizes.shape.hidden_size, sizes.shape.hidden_size
    factors = 3 * sizes.run.lora_r * (size + hidden_size) * has_adapters
    saves = sizes.trains_all or has_adapters
    saved = {
        "input": sizes.hidden_bytes * (has_adapters or (sizes.trains_all and owns_input)),
        "gate and up": 2 * inner,
        "activation": inner,
        "product": inner * saves,
        "between A and B": 3 * low_rank,
    }
    output = sizes.hidden_bytes * (3 if has_adapters else 1)
    return Stage(
        name,
        saved=saved,
        forward={"product": inner * (not saves), "output": output},
        backward={"gradients": 3 * inner + sizes.hidden_bytes},
        gradients=(weights * sizes.trains_all + factors) * sizes.compute,
    )


def _queries(sizes: Sizes) -> int:
    return sizes.tokens * sizes.attention.q_size * sizes.compute


def _keys(sizes: Sizes) -> int:
    return sizes.tokens * sizes.attention.kv_size * sizes.compute


def _values(sizes: Sizes) -> int:
    return _keys(sizes) // sizes.attention.head_dim * sizes.attention.v_head_dim


def _projection_stage(sizes: Sizes) -> Stage:
    queries, keys = _queries(sizes), _keys(sizes)
    names = ("q_proj", "k_proj", "v_proj")
    return Stage(
        "queries, keys and values",
        saved=_saved_input(sizes) | _low_rank(sizes, names),
        forward={"queries": _with_delta(sizes, queries), "keys and values": 2 * keys},
        backward={"gradients": queries + 2 * keys, "input's gradients": 3 * sizes.hidden_bytes},
        gradients=_gradients(sizes, names),
    )


def _qk_norm_stage(sizes: Sizes) -> Stage:
    """Norm every query and key (of a head, or all heads together)."""
    attention, elements = sizes.attention, _queries(sizes) + _keys(sizes)
    hidden_fp32_bytes = elements // sizes.compute * FP32
    num_norms = 2
    if attention.qk_norm == "head":
        num_norms = attention.num_heads + attention.num_kv_heads
    queries_fp32 = _queries(sizes) // sizes.compute * FP32
    return Stage(
        "norms of queries and keys",
        saved={
            "input in fp32": hidden_fp32_bytes,
            "1 / root mean square": sizes.tokens * num_norms * FP32,
            "normalised input": elements * sizes.trains_all,
        },
        forward={"queries, keys and values": elements + _keys(sizes), "in fp32": queries_fp32},
        backward={"gradients in fp32": 4 * queries_fp32, "of keys and values": 2 * _keys(sizes)},
    )


def _rotary_stage(sizes: Sizes) -> Stage:
    queries, keys = _queries(sizes), _keys(sizes)
    return Stage(
        "rotary embedding",
        saved={"queries": queries},
        forward={"parts of queries": 3 * queries, "keys and values": 2 * keys},
        backward={"gradients": 3 * queries + 2 * keys},
    )


def _core_stage(sizes: Sizes) -> Stage:
    """Return the attention itself; beside a mask, keys and values are repeated for every head."""
    attention, compute, tokens = sizes.attention, sizes.compute, sizes.tokens
    queries, output = _queries(sizes), output_bytes(sizes)
    is_repeated = sizes.has_mask and attention.num_heads != attention.num_kv_heads
    keys_and_values = (_keys(sizes) + _values(sizes)) * sizes.key_repeats
    read = queries + output if sizes.has_mask else keys_and_values
    return Stage(
        "attention",
        saved={
            "keys and values": read,
            "output": output,
            "log of sums": tokens * attention.num_heads * FP32,
            "mask": sizes.mask_elements * compute,
        },
        forward={"keys and values before": keys_and_values * is_repeated},
        backward={"gradients": queries + output + read},
    )


def exchanged_bytes(sizes: Sizes) -> int:
    """Return queries, keys and values of as many tokens and heads as a rank has before attention.

    After it has handed tokens out for heads, it has as many bytes.
    """
    return _queries(sizes) + (_keys(sizes) + _values(sizes)) * sizes.key_repeats


def output_bytes(sizes: Sizes) -> int:
    """Return the output of attention, before and after its heads go back for tokens."""
    attention = sizes.attention
    return sizes.tokens * attention.num_heads * attention.v_head_dim * sizes.compute


def _to_heads_stage(sizes: Sizes) -> Stage:
    """Exchange tokens for heads; the queries that are saved before are those that come."""
    sent, came = exchanged_bytes(sizes), exchanged_bytes(sizes)
    return Stage(
        "tokens for heads",
        forward={"keys and values": _keys(sizes) + _values(sizes), "sent": sent, "received": came},
        backward={"gradients": 2 * came + sent},
        kept=came,
    )


def _to_tokens_stage(sizes: Sizes) -> Stage:
    """Exchange heads for tokens; the output projection keeps another tensor than attention."""
    output = output_bytes(sizes)
    reads = sizes.trains_all or sizes.run.trains_attention
    before = _queries(sizes) + _keys(sizes) + _values(sizes)
    return Stage(
        "heads for tokens",
        saved={"output": output * reads},
        forward={"received": output, "of own tokens": before, "output": output * (not reads)},
        backward={"gradients": 2 * output},
        kept=output,
    )


def _output_stage(sizes: Sizes) -> Stage:
    return Stage(
        "output projection",
        saved=_low_rank(sizes, (_OUTPUT,)),
        forward={
            "output": _with_delta(sizes, sizes.hidden_bytes),
            "sum": sizes.hidden_bytes,
            "sum over tp": sizes.hidden_bytes * (sizes.run.tp_size > 1),
        },
        backward={"gradients": 2 * sizes.hidden_bytes + _queries(sizes)},
        gradients=_gradients(sizes, (_OUTPUT,)),
    )


def _latent_projection_stages(sizes: Sizes) -> list[Stage]:
    """Return projections through low ranks, each with a norm in fp32."""
    attention, compute, tokens = sizes.attention, sizes.compute, sizes.tokens
    names = tuple(name for name in attention.linears(1) if name != _OUTPUT)
    queries = _queries(sizes)
    squeezed = tokens * (attention.q_rank + attention.kv_rank)
    values = tokens * attention.num_heads * attention.v_head_dim * compute
    return [
        Stage(
            "squeezed queries, keys and values",
            saved=_saved_input(sizes)
            | _low_rank(sizes, names)
            | {
                "in fp32": squeezed * FP32,
                "normalised": 2 * squeezed * compute * sizes.trains_all,
            },
            forward={"squeezed": 3 * squeezed * compute},
            backward={"gradients": 4 * squeezed * FP32 + 3 * sizes.hidden_bytes},
            gradients=_gradients(sizes, names),
        ),
        Stage(
            "queries, keys and values",
            saved={"queries": queries},
            forward={"parts": 2 * queries + values},
            backward={"gradients": 3 * queries + values},
        ),
    ]


def _saved_input(sizes: Sizes) -> dict[str, int]:
    return {"input": sizes.hidden_bytes * (sizes.trains_all or sizes.run.trains_attention)}


def _low_rank(sizes: Sizes, names: Iterable[str]) -> dict[str, int]:
    """Return what adapters of linear layers save: the rows between their two factors."""
    count = len(tuple(names)) * sizes.run.trains_attention
    return {"between A and B": count * sizes.tokens * sizes.run.lora_r * sizes.compute}


def _with_delta(sizes: Sizes, output: int) -> int:
    """Return an output, and with adapters what is added to it before and after scaling."""
    return output * (3 if sizes.run.trains_attention else 1)


def _gradients(sizes: Sizes, names: Iterable[str]) -> int:
    linears = sizes.attention.linears(sizes.shape.hidden_size)
    wanted = [linears[name] for name in names]
    if sizes.trains_all:
        return sum(num_in * num_out for num_in, num_out in wanted) * sizes.compute
    if not sizes.run.trains_attention:
        return 0
    return sum(sizes.run.lora_r * (num_in + num_out) for num_in, num_out in wanted) * sizes.compute
