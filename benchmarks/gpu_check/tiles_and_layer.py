"""Part 3: the search for tiles as `megablocks_utils.tune` makes it, then one MoE layer."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.dry_run import save_dry_config
from benchmarks.gpu_check.part import Part, WrongFigureError
from benchmarks.gpu_check.programs import Finished, Program
from benchmarks.harness.outcome import FAILED
from benchmarks.harness.processes import as_words
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.record import Record, Row
from benchmarks.moe_layer.contenders import OURS_GROUPED_MM
from benchmarks.moe_layer.measure import WRONG
from megablocks_utils.config.quantization import NO_QUANTIZATION
from megablocks_utils.kernels.tuning.measurements import CACHE_VARIABLE, read_entries

_MODELS = ROOT / "benchmarks" / "models"
_MIXTRAL, _QWEN3 = (_MODELS / name for name in ("mixtral-8x7b", "qwen3-30b-a3b"))
_TIMEOUT_S = 120.0
_LAYER_MINUTES, _LEAST_LAYER_MINUTES = 3.0, 0.5
_AFTER_LAYER_MINUTES = 1.5
"""What the layer's table may take beyond its minutes: it ends no measurement that has begun."""
_KEPT, _LAYER = "kernels.json", "moe_layer.json"


@dataclass(frozen=True)
class _Search:
    """A layer whose tiles are searched for."""

    model: Path
    use_lora: str
    tokens: int = 16384
    expert_quantization: str = NO_QUANTIZATION

    @property
    def name(self) -> str:
        packed = "" if self.expert_quantization == NO_QUANTIZATION else self.expert_quantization
        words = [f"tiles: {self.model.name}", f"lora {self.use_lora}", f"{self.tokens} tokens"]
        return ", ".join(filter(None, [*words, packed]))


def run(part: Part) -> None:
    """Search, then measure the layer with the tiles that were found.

    Both keep what they found in the folder of the results, whatever happens to the part.
    """
    environment = {CACHE_VARIABLE: str(part.output)}
    module = "benchmarks.gpu_check.tune_dry_run" if part.is_dry else "megablocks_utils.tune"
    searches = [
        Program(
            one.name,
            ("-m", module, *as_words(_search_options(one))),
            _TIMEOUT_S,
            hides_gpu=part.is_dry,
            environment=environment,
        )
        for one in _list_searches(part)
    ]
    part.run(searches, lambda finished: _read_search(finished, part.output / _KEPT))
    path = part.output / _LAYER
    layer = Program(
        "layer table",
        ("-m", "benchmarks.moe_layer", *_layer_words(part), "--output", str(path)),
        60 * (_LAYER_MINUTES + _AFTER_LAYER_MINUTES),
        hides_gpu=part.is_dry,
        environment=environment,
    )
    part.run([layer], lambda _: read_layer(path))


def read_layer(path: Path) -> Row:
    """Count the rows of the layer's table by status.

    Raises:
        WrongFigureError: a contender gave wrong results, or broke.
    """
    rows = Record.read(path).rows
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    found = {"file": path.name, "rows": counts}
    for row in rows:
        if row["status"] in (WRONG, FAILED):
            reason = f"{row['side']}, {row['case']['name']}, {row['case']['mode']}: {row['reason']}"
            raise WrongFigureError(reason, found)
    return found


def _list_searches(part: Part) -> list[_Search]:
    if part.is_dry:
        folder = save_dry_config(part.scratch / "model")
        return [_Search(folder, "all", 16), _Search(folder, "all", 16, "nf4")]
    searches = [
        _Search(model, use_lora) for use_lora in ("none", "all") for model in (_MIXTRAL, _QWEN3)
    ]
    # Looked up as they are multiplied, against numbers made before: for many rows, and for few.
    packed = [_Search(_QWEN3, "all", tokens, "nf4") for tokens in (16384, 1024)]
    return [*searches, *packed]


def _search_options(search: _Search) -> dict[str, Any]:
    return {
        "model_name_or_path": search.model,
        "tokens": search.tokens,
        "use_lora": search.use_lora,
        "expert_quantization": search.expert_quantization,
    }


def _read_search(finished: Finished, kept: Path) -> Row:
    """Return the table of the search, and check that the search was kept."""
    table = finished.output()
    if not read_entries(kept):
        raise WrongFigureError("nothing was kept", {"table": table})
    return {"table": table, "file": kept.name}


def _layer_words(part: Part) -> list[str]:
    if part.is_dry:
        words = ["--device", "cpu", "--quick", "--modes", "lora16", "--routings", "uniform"]
        return [*words, "--backends", OURS_GROUPED_MM]
    left = (part.deadline - time.monotonic()) / 60 - _AFTER_LAYER_MINUTES
    minutes = max(_LEAST_LAYER_MINUTES, min(_LAYER_MINUTES, left))
    words = ["--minutes", f"{minutes:.2f}", "--routings", "uniform", "--modes", "full", "lora16"]
    return [*words, "--shapes", "Mixtral-8x7B", "Qwen3-30B-A3B"]
