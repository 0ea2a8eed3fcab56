"""What a model is, as it was built: sizes that its config.json need not say. Torch-free.

`training.model_facts` fills it from a model on meta; it travels between processes as JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ModelDescription", "read_description", "write_description"]


@dataclass(frozen=True)
class ModelDescription:
    """Hold what a plan asks of a built model.

    Attributes:
        model_type: family, by transformers' name.
        parameters: (name, shape) of every parameter, a tied one once.
        layers: path of the list of decoder layers.
        experts: paths of the modules with experts.
        embedding: name of the embedding's weight.
        num_experts: E; what divides that of every layer where they differ.
        top_k: K; 1 where nothing says it.
        expert_size: I.
        hidden_size: of the model.
        vocab_size: V.
        is_tied: whether the output head is the embedding.
        aux_loss_coef: weight of the load-balancing loss that the config turns on; 0 if it is off.
        num_heads: of queries, by the config.
        num_kv_heads: of keys and values, likewise.
        sliding_window: tokens that attention looks back; None for all.
        not_known: what no formula has, in words; empty where all of it may be known.
        not_known_under_tp: likewise of how tensor parallelism splits it.
        mixer_linears: paths of the linear layers that mix tokens and can have adapters.
        dense_linears: likewise of dense MLPs and shared experts.
        routes_in_fp32: whether the routing weights reach the experts in fp32, whatever is computed
            in.
        kept: names of parameters that every rank holds whole in float32, as transformers keeps
            them beside narrower ones.
        frozen: names of parameters that training on text gives no gradient.
    """

    model_type: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    layers: str
    experts: tuple[str, ...]
    embedding: str
    num_experts: int
    top_k: int
    expert_size: int
    hidden_size: int
    vocab_size: int
    is_tied: bool
    aux_loss_coef: float
    num_heads: int
    num_kv_heads: int
    sliding_window: int | None
    not_known: str
    not_known_under_tp: str = ""
    mixer_linears: tuple[str, ...] = ()
    dense_linears: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    routes_in_fp32: bool = True


def write_description(description: ModelDescription) -> dict[str, Any]:
    """Return it as JSON has it."""
    return asdict(description)


def read_description(record: Mapping[str, Any]) -> ModelDescription:
    """Read what `write_description` has written."""
    parameters = tuple((name, tuple(shape)) for name, shape in record["parameters"])
    lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    return ModelDescription(**dict(record) | lists | {"parameters": parameters})
