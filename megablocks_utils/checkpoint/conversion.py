"""Run transformers' own operations between stored tensors and parameters, in both directions."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightTransform,
    revert_weight_conversion,
)

from megablocks_utils.checkpoint.stored_names import last_number
from megablocks_utils.errors import CheckpointError

__all__ = ["Conversion", "ModelShapes", "revert", "saved_transforms"]


@dataclass
class ModelShapes:
    """Answer what transformers' operations ask a model for: shapes, config, how it was loaded."""

    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig
    _weight_conversions: Sequence[WeightTransform] | None = None

    def get_parameter(self, name: str) -> Tensor:
        """Return a tensor without values that has the shape of a parameter."""
        return torch.empty(self.shapes[name], device="meta")


@dataclass(frozen=True)
class Conversion:
    """Make one or several parameters out of the tensors that one converter takes.

    Attributes:
        converter: transformers' own.
        first: the parameter that the stored tensors are renamed to.
        sources: each stored tensor and what the converter calls it, in order.
    """

    converter: WeightConverter
    first: str
    sources: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the parameters it makes."""
        targets = self.converter.target_patterns
        before, _, after = self.first.partition(targets[0])
        return (self.first, *(f"{before}{target}{after}" for target in targets[1:]))

    def check_numbers(self) -> None:
        """Refuse experts with a gap between them, which would all be taken for one before theirs.

        Raises:
            CheckpointError: an expert is missing.
        """
        places: dict[str, list[int]] = {}
        for key, pattern in self.sources:
            if "*" in pattern:
                places.setdefault(pattern, []).append(last_number(key))
        for seen in places.values():
            if seen != list(range(len(seen))):
                missing = next(number for number in range(len(seen)) if number not in seen)
                raise CheckpointError(f"expert {missing} is not stored")

    def run(self, tensors: Mapping[str, Tensor], model: ModelShapes) -> dict[str, Tensor]:
        """Return the parameters that become of the stored tensors `tensors`."""
        converter = deepcopy(self.converter)
        for key, pattern in self.sources:
            # Saving passes tensors too, though the hint says futures.
            converter.add_tensor(self.first, key, pattern, tensors[key])  # type: ignore[arg-type]
        made = converter.convert(self.first, model=model, config=model.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


def saved_transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the transforms that transformers reverts for a model that it has not loaded."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [t for t in transforms if not isinstance(t, PrefixChange)]


def revert(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
    transforms: Sequence[WeightTransform],
) -> dict[str, Tensor]:
    """Return parameters under the names and in the form in which transformers saves them.

    Args:
        tensors: all parameters that a reversed converter takes together, or meta tensors.
        shapes: of all parameters.
        config: of the model.
        transforms: what renamed and converted the stored tensors.
    """
    model = ModelShapes(shapes, config, list(transforms))
    # It asks the model for no more than ModelShapes has.
    return revert_weight_conversion(model, dict(tensors))  # type: ignore[arg-type]
