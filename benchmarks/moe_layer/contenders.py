"""All contenders of the layer benchmark by name, in the order they are measured."""

import importlib
from collections.abc import Callable
from functools import partial

from benchmarks.harness.contender import Contender
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import LayerInputs, LayerWeights
from benchmarks.moe_layer.ours import build_backend_contender, build_layer_contender

Builder = Callable[[Case, LayerWeights, LayerInputs], Contender]


def _other(name: str, *settings: str) -> Builder:
    """Return a builder of `others`, whose libraries are imported when it is called."""

    def build(case: Case, weights: LayerWeights, inputs: LayerInputs) -> Contender:
        module = importlib.import_module("benchmarks.moe_layer.others")
        return getattr(module, name)(*settings, case, weights, inputs)

    return build


OURS, OURS_GROUPED_MM, BASELINE, SCATTERMOE = "triton", "grouped_mm", "transformers", "scattermoe"
PEFT = "peft"
CONTENDERS: dict[str, Builder] = {
    OURS: partial(build_backend_contender, "triton"),
    BASELINE: _other("build_transformers", "grouped_mm"),
    OURS_GROUPED_MM: partial(build_backend_contender, "grouped_mm"),
    SCATTERMOE: partial(build_backend_contender, "scattermoe"),
    "megablocks": partial(build_backend_contender, "megablocks"),
    PEFT: _other("build_peft"),
    "axolotl": _other("build_axolotl"),
    "transformers_eager": _other("build_transformers", "eager"),
}
CPU_CONTENDERS: dict[str, Builder] = {
    OURS_GROUPED_MM: partial(build_layer_contender, "grouped_mm"),
    BASELINE: CONTENDERS[BASELINE],
    PEFT: CONTENDERS[PEFT],
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
