"""The linear layers that the experts of a model were in transformers 4, each expert by itself.

They had the names under which experts are stored on the Hub one by one, which transformers'
conversion mapping still knows. Where a family is stored with all experts in one tensor, they never
were linear layers.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedModel

from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.lora.peft_format import ExpertPlace, Shape, find_expert_places

__all__ = ["SingleExpertLayer", "SingleExpertNames"]


class SingleExpertLayer(NamedTuple):
    """Describe one linear layer of one expert.

    Attributes:
        name: of the layer, `model.layers.0.block_sparse_moe.experts.0.w1`.
        shape: (out, in) of its weight.
        rows: which outputs of the projection are its own.
    """

    name: str
    shape: Shape
    rows: range


class SingleExpertNames:
    """Know the linear layers of single experts of a model.

    Args:
        model: as transformers builds it, on meta or not.
        layout: of the checkpoint whose names are wanted; None is that which transformers saves.
    """

    def __init__(self, model: PreTrainedModel, layout: ModelLayout | None = None) -> None:
        self._layout = layout or ModelLayout.of_saved(model)
        self._places = find_expert_places(model)

    @cached_property
    def last_names(self) -> tuple[str, ...]:
        """Last names of the layers, in the order in which the projections hold them."""
        names = (layer.name for name in self._places for layer in self.layers(name, 0))
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))

    def num_experts(self, name: str) -> int:
        """Return the experts of a parameter."""
        return self._places[name].num_stored

    def linear(self, name: str) -> str | None:
        """Return the Hub name of a linear layer; None for one that is not stored as it is.

        Args:
            name: of the layer in the model, `model.layers.0.self_attn.q_proj`.
        """
        weight = f"{name}.weight"
        stored = self._layout.sources(weight) if self._layout.is_plain(weight) else ()
        return stored[0].removesuffix(".weight") if stored else None

    def layers(self, name: str, expert: int) -> tuple[SingleExpertLayer, ...]:
        """Return the layers of one expert of a parameter, in the order of its rows.

        Args:
            name: of the parameter.
            expert: global index.
        """
        return tuple(self._read_layers(name, expert, self._places[name]))

    def _read_layers(
        self, name: str, expert: int, place: ExpertPlace
    ) -> Iterator[SingleExpertLayer]:
        for part in self._layout.expert_parts(name, range(expert, expert + 1)):
            if part.item is None:
                rows, columns = part.rows.memory, part.columns.memory
                rows, columns = (columns, rows) if place.is_transposed else (rows, columns)
                shape = (len(rows), len(columns))
                yield SingleExpertLayer(part.key.removesuffix(".weight"), shape, rows)
