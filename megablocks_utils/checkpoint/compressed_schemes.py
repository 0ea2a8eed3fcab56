"""Which of compressed-tensors' schemes, several in one model at times, a stored weight has."""

import re
from collections.abc import Mapping, Sequence

import torch
from transformers.integrations.compressed_tensors import (
    CompressedTensorsDequantize,
    get_dense_scheme,
    get_experts_scheme,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from megablocks_utils.checkpoint.compressed_weights import CompressedWeight, Scheme
from megablocks_utils.checkpoint.packed_weights import StoredPart
from megablocks_utils.checkpoint.quantization_config import COMPRESSED_FORMATS, Quantization
from megablocks_utils.errors import CheckpointError

__all__ = ["CompressedSchemes"]

_EXPERT = re.compile(r"\.experts\.\d+\.")
_PATTERN = "re:"
_STRATEGIES = ("tensor", "channel", "group", "block")


class CompressedSchemes:
    """The schemes of a model's configuration.

    Args:
        quantization: the configuration.
        quantizer: transformers', made from it.
        dtype: that weights are read in.
    """

    def __init__(
        self, quantization: Quantization, quantizer: HfQuantizer, dtype: torch.dtype
    ) -> None:
        assert isinstance(quantizer, CompressedTensorsHfQuantizer), "it is of that method"
        self._path = quantization.path
        self._dtype = dtype
        self._quantizer = quantizer
        self._config = quantizer.compressor.quantization_config
        self._schemes: Sequence[Scheme] = list(self._config.config_groups.values())
        self._of_experts: Scheme = get_experts_scheme(self._config)
        self._of_others: Scheme = get_dense_scheme(self._config)

    def build(self, module: str, parts: Mapping[str, StoredPart]) -> CompressedWeight:
        """Return the weight of a module, by what is stored for it.

        Args:
            module: its name in the checkpoint.
            parts: by the last word of their names.

        Raises:
            CheckpointError: the configuration packs it in another way, or one that is not read.
        """
        is_of_expert = _EXPERT.search(f"{module}.") is not None
        scheme = self._find(module, is_of_expert=is_of_expert)
        storage = str(scheme.format or self._config.format)
        self._check(module, parts, scheme, storage)
        return CompressedWeight(
            parts,
            scheme,
            storage,
            self._dtype,
            operation=CompressedTensorsDequantize(self._quantizer, scheme),
            is_of_expert=is_of_expert,
        )

    def _find(self, module: str, *, is_of_expert: bool) -> Scheme:
        """Return the scheme that names the module, else the one that transformers takes."""
        for scheme in self._schemes:
            if any(_names(target, module) for target in scheme.targets):
                return scheme
        return self._of_experts if is_of_expert else self._of_others

    def _check(
        self, module: str, parts: Mapping[str, StoredPart], scheme: Scheme, storage: str
    ) -> None:
        """Refuse what is not stored as its scheme says, and schemes that are not read."""
        args = scheme.weights
        found = f"{self._path} packs {module} with"
        if args is None or storage not in COMPRESSED_FORMATS:
            raise CheckpointError(f"{found} format {storage}, which is not read for a weight")
        if args.strategy not in _STRATEGIES:
            raise CheckpointError(f"{found} strategy {args.strategy}, which is not read")
        if "weight_g_idx" in parts:
            raise CheckpointError(f"{found} columns in another order, which is not read")
        wanted = COMPRESSED_FORMATS[storage]
        zero_points = () if args.symmetric else ("weight_zero_point",)
        for name in (wanted, *zero_points):
            if name not in parts:
                raise CheckpointError(f"{found} format {storage}, but no {name} is stored for it")


def _names(target: str, module: str) -> bool:
    """Whether a target of a scheme is this module's name, or a pattern of it."""
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return target == module
