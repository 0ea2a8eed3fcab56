"""The loads of experts: what is measured of a step, and `expert_load.jsonl`."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megablocks_utils.config.expert_balance import MeasuredLoads
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.report.json_lines import JsonLinesWriter

__all__ = ["LayerLoad", "LoadWriter", "StepLoads", "describe_layer", "read_loads"]
__all__ += ["read_measured_loads"]

_DIGITS = 9


@dataclass(frozen=True)
class LayerLoad:
    """Hold what the experts of one layer had to do in one step, over the global batch.

    Padding is not counted, nor is what is recomputed.

    Attributes:
        layer: qualified name of the experts.
        rows: tokens times experts of a token.
        share: of the rows, for each expert; their sum is 1.
        max_over_mean: rows of the busiest expert over their mean.
        rank_max_over_mean: rows of the busiest rank of an ep group over the group's mean, of the
            worst group: the others wait for it. 1 without expert parallelism.
        entropy: of the shares in nats; the logarithm of the number of experts where they are equal.
        dead_experts: those without a token.
        top1_margin: mean over tokens of the largest routing weight less the second; None where
            a token has one expert, or the experts are not told the weights.
    """

    layer: str
    rows: int
    share: tuple[float, ...]
    max_over_mean: float
    rank_max_over_mean: float
    entropy: float
    dead_experts: tuple[int, ...]
    top1_margin: float | None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return what a line of the file holds; TypeError or KeyError for another line."""
        sequences = {name: tuple(record[name]) for name in ("share", "dead_experts")}
        return cls(**(record | sequences))


@dataclass(frozen=True)
class StepLoads:
    """Hold the loads of all layers in one step.

    Attributes:
        step: optimizer steps done, this one included.
        layers: in the order of the model; layers without a token are left out.
    """

    step: int
    layers: tuple[LayerLoad, ...]

    @property
    def max_over_mean(self) -> float | None:
        """Rows of the busiest expert over the mean of its layer, in the worst layer."""
        return max((layer.max_over_mean for layer in self.layers), default=None)

    def as_records(self) -> list[dict[str, Any]]:
        """Return the lines of the file: one a layer."""
        return [{"step": self.step} | asdict(layer) for layer in self.layers]


class LoadWriter(JsonLinesWriter):
    """Write `expert_load.jsonl`: a line for each layer of a measured step. Rank 0 only."""

    def write(self, loads: StepLoads) -> None:
        """Append one step.

        Raises:
            OSError: The file cannot be written.
        """
        self.append(loads.as_records())


def describe_layer(
    name: str,
    tokens: Sequence[float],
    groups: Sequence[Sequence[float]],
    top1_margin: float | None,
) -> LayerLoad:
    """Describe the load of a layer.

    Args:
        name: of its experts.
        tokens: of each expert; not all are zero.
        groups: rows of each rank, by ep group.
        top1_margin: see `LayerLoad`.
    """
    total = sum(tokens)
    shares = [count / total for count in tokens]
    ratios = [max(ranks) * len(ranks) / sum(ranks) for ranks in groups if sum(ranks)]
    return LayerLoad(
        layer=name,
        rows=round(total),
        share=tuple(round(share, _DIGITS) for share in shares),
        max_over_mean=round(max(shares) * len(shares), _DIGITS),
        rank_max_over_mean=round(max(ratios), _DIGITS),
        entropy=round(-sum(share * math.log(share) for share in shares if share), _DIGITS),
        dead_experts=tuple(expert for expert, count in enumerate(tokens) if not count),
        top1_margin=None if top1_margin is None else round(top1_margin, _DIGITS),
    )


def read_loads(path: str | Path) -> Iterator[StepLoads]:
    """Yield the steps of `expert_load.jsonl`.

    Raises:
        OSError: It cannot be read.
        ValueError: for a line that is none of its own, as KeyError and TypeError.
    """
    step, layers = None, []
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            line_step: int = record.pop("step")
            if step is not None and line_step != step:
                yield StepLoads(step, tuple(layers))
                layers = []
            step = line_step
            layers.append(LayerLoad.from_record(record))
    if step is not None:
        yield StepLoads(step, tuple(layers))


def read_measured_loads(path: str | Path, parameter: str) -> MeasuredLoads:
    """Read all steps of `expert_load.jsonl`, to place the experts by them.

    Args:
        path: the file.
        parameter: that names it.

    Raises:
        ConfigurationError: it cannot be read, holds other lines, or none.
    """
    try:
        loads = MeasuredLoads.collect(str(path), _read_lines(path))
    except OSError as error:
        fault = error.strerror
    except _UnusableLine as error:
        fault = str(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fault = "it holds a line that is none"
    else:
        if loads.layers:
            return loads
        fault = "it is empty"
    raise ConfigurationError(
        f"{parameter} is {path}, but it must be an expert_load.jsonl, as --expert_load_steps "
        f"writes it: {fault}.",
        parameters=(parameter,),
    )


class _UnusableLine(Exception):
    """Say in a clause why the loads of a line cannot be used."""


def _read_lines(path: str | Path) -> Iterator[tuple[str, int, tuple[float, ...]]]:
    for step in read_loads(path):
        for layer in step.layers:
            fault = _find_fault(layer)
            if fault is not None:
                raise _UnusableLine(fault)
            yield layer.layer, layer.rows, layer.share


def _find_fault(layer: LayerLoad) -> str | None:
    """Say in a clause why a line's loads cannot be used, or return None."""
    numbers = (layer.rows, *layer.share)
    if not isinstance(layer.layer, str) or not layer.share:
        return "it holds a line without a layer or shares"
    if not all(
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < 1e18
        for number in numbers
    ):
        return f"its {layer.layer} has shares that are no numbers of at least 0"
    if not 0.99 < sum(layer.share) < 1.01:
        return f"the shares of its {layer.layer} do not add up to 1"
    return None
