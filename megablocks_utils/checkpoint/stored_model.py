"""The whole model of a checkpoint of a run: what it holds, and what it leaves to its base."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.distributed_checkpoint import MODEL_PREFIX, read_whole_tensor
from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = ["StoredModel"]

_Spec = tuple[str, tuple[int, ...], torch.dtype]


class StoredModel:
    """Give the tensors of a checkpoint's model, those that were not trained from its base.

    Args:
        folder: the checkpoint.
        stored: shape and dtype of each tensor that it holds of the model.
        model: on meta, by the checkpoint's config.
        base: what the manifest says of the base; None in one of an earlier version.

    Attributes:
        layout: where the model lies in the base, or where transformers would write it.
        base: reads the base; None where it is not needed and not there.
        specs: name, whole shape and dtype of each tensor.

    Raises:
        CheckpointError: the checkpoint holds another model than its config describes, or the base
            is needed and cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        model: PreTrainedModel,
        base: Mapping[str, str | int] | None,
    ) -> None:
        self._folder = folder
        self._stored = stored
        wanted = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if name not in model.all_tied_weights_keys
        }
        self._check_names(wanted)
        left = sorted(wanted.keys() - stored.keys())
        num_passed_through = int(base["num_passed_through"]) if base else 0
        self.base = None
        if base is not None:
            self.base = self._open_base(Path(str(base["folder"])), model, left, num_passed_through)
        elif left:
            raise CheckpointError(f"the checkpoint {folder} lacks {left[0]}")
        self.layout = ModelLayout.of_saved(model) if self.base is None else self.base.layout
        trained = [
            spec[1] for name, spec in stored.items() if isinstance(wanted[name], nn.Parameter)
        ]
        dtype = next(iter(trained), torch.float32)
        self.specs: list[_Spec] = [
            (name, *self._spec(name, tensor, dtype)) for name, tensor in wanted.items()
        ]

    def tensors(self, advance: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
        """Yield one whole tensor after the other; none is held while the next one is read.

        Args:
            advance: called with the bytes of each.
        """
        for name, shape, dtype in self.specs:
            if name in self._stored:
                tensor = read_whole_tensor(MODEL_PREFIX + name, *self._stored[name], self._folder)
                yield name, tensor.view(shape)
                del tensor
            else:
                assert self.base is not None, "else it was refused"
                whole = torch.empty(shape, dtype=dtype)
                self.base.fill_local(name, whole, (0,) * len(shape))
                yield name, whole
                del whole
            advance(math.prod(shape) * dtype.itemsize)

    def _spec(
        self, name: str, tensor: Tensor, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        shape, stored_dtype = self._stored.get(name, (tuple(tensor.shape), None))
        is_parameter = isinstance(tensor, nn.Parameter)
        return (shape if tensor.dim() else ()), stored_dtype or (
            dtype if is_parameter else tensor.dtype
        )

    def _check_names(self, wanted: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint of another model than its config describes."""
        others = self._stored.keys() - wanted.keys()
        if others:
            raise CheckpointError(
                f"the checkpoint {self._folder} holds, besides what its {MODEL_CONFIG_NAME}"
                f" describes, {min(others)}"
            )
        for name, (shape, _) in self._stored.items():
            whole = tuple(wanted[name].shape) or (1,)
            # Experts that are never computed with are left to the base.
            if shape[1:] != whole[1:] or shape[0] > whole[0]:
                raise CheckpointError(
                    f"the checkpoint {self._folder} holds {name} in shape {shape}, wanted is"
                    f" {whole} by its {MODEL_CONFIG_NAME}"
                )

    def _open_base(
        self, folder: Path, model: PreTrainedModel, left: list[str], num_passed_through: int
    ) -> SliceReader | None:
        """Open the base; None if it is gone, or another by now, and nothing of it is needed."""
        is_needed = bool(left) or num_passed_through > 0
        try:
            # Quantized weights that were not trained are what the run has read them as.
            index = open_checkpoint(folder, dtype=next(d for _, d in self._stored.values()))
            layout = ModelLayout(model, index)
            check_against_model(model, index, layout)
        except CheckpointError as error:
            if not is_needed:
                return None
            needed = left[0] if left else f"{num_passed_through} tensors that nobody trains"
            raise CheckpointError(
                f"the checkpoint {self._folder} leaves {needed} to its base: {error}"
            ) from error
        return SliceReader(index, layout)
