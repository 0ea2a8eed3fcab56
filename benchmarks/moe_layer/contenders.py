"""All sides of the layer benchmark by name, in the order they are measured."""

import importlib
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness.contender import LayerSide
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import LayerWeights
from benchmarks.moe_layer.ours import build_backend_side, build_layer_side

Builder = Callable[[Case, LayerWeights, torch.device], LayerSide]


def _foreign(name: str, *settings: str) -> Builder:
    """Return a builder of `foreign_sides`, whose libraries are imported when it is called."""

    def build(case: Case, weights: LayerWeights, device: torch.device) -> LayerSide:
        module = importlib.import_module("benchmarks.moe_layer.others")
        return getattr(module, name)(*settings, case, weights, device)

    return build


OURS, OURS_GROUPED_MM, BASELINE, SCATTERMOE = "triton", "grouped_mm", "transformers", "scattermoe"
PEFT = "peft"
SIDES: dict[str, Builder] = {
    OURS: partial(build_backend_side, "triton"),
    BASELINE: _foreign("build_transformers_side", "grouped_mm"),
    OURS_GROUPED_MM: partial(build_backend_side, "grouped_mm"),
    SCATTERMOE: partial(build_backend_side, "scattermoe"),
    "megablocks": partial(build_backend_side, "megablocks"),
    PEFT: _foreign("build_peft_side"),
    "axolotl": _foreign("build_axolotl_side"),
    "transformers_eager": _foreign("build_transformers_side", "eager"),
}
CPU_SIDES: dict[str, Builder] = {
    OURS_GROUPED_MM: partial(build_layer_side, "grouped_mm"),
    BASELINE: SIDES[BASELINE],
    PEFT: _foreign("build_peft_side"),
}
TITLES = {
    OURS: "ours, triton",
    BASELINE: "transformers grouped_mm (adapters split)",
    OURS_GROUPED_MM: "ours, grouped_mm",
    SCATTERMOE: "ScatterMoE",
    "megablocks": "MegaBlocks",
    PEFT: "PEFT over transformers grouped_mm",
    "axolotl": "axolotl's ScatterMoE",
    "transformers_eager": "transformers eager",
}
