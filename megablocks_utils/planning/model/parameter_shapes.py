"""Every parameter of a decoder layer, as transformers builds it."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

__all__ = [
    "DENSE",
    "MIXER",
    "AttentionShape",
    "LayerShape",
    "ParameterShape",
    "list_mlp",
    "list_moe",
    "norm",
]

MIXER, DENSE = "mixer", "dense"
"""Linear layers that get adapters: those that mix tokens, and dense MLPs with shared experts."""


@dataclass(frozen=True)
class ParameterShape:
    """One parameter.

    Attributes:
        name: within its layer; the whole name of one that is in no layer.
        shape: of the whole.
        room: `embedding`, `head`, `norm`, `attention`, `router`, `experts` or `mlp` (dense layers
            and shared experts).
        adapter: which choice of `--use_lora` puts adapters on it: `mixer`, `dense` or none.
        is_kept: whether every rank holds it whole, in float32.
        is_frozen: whether no run trains it.
    """

    name: str
    shape: tuple[int, ...]
    room: str
    adapter: str = ""
    is_kept: bool = False
    is_frozen: bool = False

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def tp_dim(self) -> int | None:
        """Dim that tensor parallelism splits, where it splits all that the formulas know of it."""
        if self.room in _TP_DIMS:
            return _TP_DIMS[self.room]
        linear, _, kind = self.name.rpartition(".")
        dim = _TP_DIMS.get(linear.rpartition(".")[2])
        return None if dim == 1 and kind == "bias" else dim


_TP_DIMS = {"embedding": 1, "head": 0, "o_proj": 1, "down_proj": 1}
_TP_DIMS |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0)
"""By room or by the name of a linear layer."""


@dataclass(frozen=True)
class LayerShape:
    """One kind of decoder layer.

    Attributes:
        parameters: all of it.
        is_moe: whether it has experts.
        mlp_size: intermediate size of its dense MLP or its shared experts; 0 for neither.
    """

    parameters: tuple[ParameterShape, ...]
    is_moe: bool
    mlp_size: int

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention.

    Attributes:
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of a query and a key.
        v_head_dim: of a value.
        rope_dim: dims of a head that are rotated.
        qk_norm: what is normalised of queries and keys: `none`, `head` or `whole`.
        has_bias: whether its linear layers have one.
        q_rank: that queries are squeezed through; 0 for none.
        kv_rank: that keys and values are squeezed through; 0 for none.
        sliding_window: tokens that attention looks back; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rope_dim: int
    qk_norm: str = "none"
    has_bias: bool = False
    q_rank: int = 0
    kv_rank: int = 0
    sliding_window: int | None = None

    @property
    def q_size(self) -> int:
        """Elements of a token's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of a token's keys."""
        return self.num_kv_heads * self.head_dim

    def linears(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Return (in, out) of every linear layer, by name."""
        output = {"o_proj": (self.num_heads * self.v_head_dim, hidden_size)}
        if not self.kv_rank:
            kv = (hidden_size, self.kv_size)
            return {"q_proj": (hidden_size, self.q_size), "k_proj": kv, "v_proj": kv} | output
        queries = {"q_proj": (hidden_size, self.q_size)}
        if self.q_rank:
            queries = {
                "q_a_proj": (hidden_size, self.q_rank),
                "q_b_proj": (self.q_rank, self.q_size),
            }
        kv_out = self.num_heads * (self.head_dim - self.rope_dim + self.v_head_dim)
        keys = {
            "kv_a_proj_with_mqa": (hidden_size, self.kv_rank + self.rope_dim),
            "kv_b_proj": (self.kv_rank, kv_out),
        }
        return queries | keys | output

    def parameters(self, hidden_size: int) -> list[ParameterShape]:
        """Return weights, biases and norms."""
        found = []
        for name, sizes in self.linears(hidden_size).items():
            # transformers gives a bias to none of those that project all heads from low ranks.
            never = self.kv_rank and name in ("q_proj", "q_b_proj", "kv_b_proj")
            has_bias = self.has_bias and not never
            found += _linear(f"self_attn.{name}", "attention", sizes, MIXER, has_bias=has_bias)
        return found + [norm(f"self_attn.{name}", size) for name, size in self._norms().items()]

    def _norms(self) -> dict[str, int]:
        if self.kv_rank:
            queries = {"q_a_layernorm": self.q_rank} if self.q_rank else {}
            return queries | {"kv_a_layernorm": self.kv_rank}
        sizes = {"head": (self.head_dim, self.head_dim), "whole": (self.q_size, self.kv_size)}
        if self.qk_norm == "none":
            return {}
        return dict(zip(("q_norm", "k_norm"), sizes[self.qk_norm], strict=True))


def norm(name: str, size: int) -> ParameterShape:
    """Return a norm's weight."""
    return ParameterShape(f"{name}.weight", (size,), "norm")


def list_mlp(name: str, hidden_size: int, size: int) -> list[ParameterShape]:
    """Return a dense MLP."""
    sizes = {"gate_proj": (hidden_size, size), "up_proj": (hidden_size, size)}
    sizes["down_proj"] = (size, hidden_size)
    return [p for n, both in sizes.items() for p in _linear(f"{name}.{n}", "mlp", both, DENSE)]


def list_moe(num_experts: int, hidden_size: int, size: int) -> list[ParameterShape]:
    """Return the router and the experts; gate and up are one matrix."""
    shapes = {"gate_up_proj": (2 * size, hidden_size), "down_proj": (hidden_size, size)}
    return [
        ParameterShape("mlp.gate.weight", (num_experts, hidden_size), "router"),
        *(
            ParameterShape(f"mlp.experts.{name}", (num_experts, *shape), "experts")
            for name, shape in shapes.items()
        ),
    ]


def _linear(
    name: str, room: str, sizes: tuple[int, int], adapter: str, *, has_bias: bool = False
) -> list[ParameterShape]:
    num_in, num_out = sizes
    weight = ParameterShape(f"{name}.weight", (num_out, num_in), room, adapter)
    return [weight, ParameterShape(f"{name}.bias", (num_out,), room)] if has_bias else [weight]
