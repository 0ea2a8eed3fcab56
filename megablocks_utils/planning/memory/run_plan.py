"""The plan of a run that is about to start: its peak, and whether it is possible at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megablocks_utils.config import RunConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.remedies import find_remedies
from megablocks_utils.planning.memory.scenario import Scenario, read_shape
from megablocks_utils.planning.memory.verdict import WORDS, Verdict, judge
from megablocks_utils.planning.model.prediction import ParallelLayout, Prediction
from megablocks_utils.planning.model.units import format_gb

__all__ = ["RunPlan", "plan_run"]


@dataclass(frozen=True)
class RunPlan:
    """What is predicted of one run, on its fullest rank.

    Attributes:
        scenario: the run.
        layout: how it spreads its experts.
        prediction: bytes held and sent.
        verdict: whether they fit.
    """

    scenario: Scenario
    layout: ParallelLayout
    prediction: Prediction
    verdict: Verdict

    @property
    def is_impossible(self) -> bool:
        """Whether the tensors alone, without any reserve, are more than the device has."""
        return self.verdict.is_impossible

    def describe(self) -> str:
        """Say the peak in one line, for the summary at the start."""
        of_it = format_gb(self.prediction.components[self.prediction.largest_component])
        return (
            f"peak {format_gb(self.verdict.peak_bytes)} in the {self.prediction.moment} "
            f"({of_it} {self.verdict.cause}) of {format_gb(self.verdict.capacity_bytes)}: "
            f"{self.verdict.name}"
        )

    def describe_impossible(self) -> str:
        """Say why the run is refused, what helps, and how to start it all the same."""
        remedies = find_remedies(self.scenario, self.layout, self.verdict.capacity_bytes)
        # The number of ranks is no option of a run.
        words = [r.describe() for r in remedies if "--gpus" not in r.words]
        helps = f"; {words[0]} would fit" if words else ""
        of_it = format_gb(self.prediction.components[self.prediction.largest_component])
        return (
            f"the plan's peak is {format_gb(self.verdict.peak_bytes)} a rank "
            f"({of_it} {self.verdict.cause}), but a device has "
            f"{format_gb(self.verdict.capacity_bytes)}{helps}; --ignore_plan True starts all "
            "the same."
        )

    def as_record(self) -> dict[str, Any]:
        """Return what `run.json` holds under `plan`, before anything is measured."""
        return {
            "layout": {"ep_size": self.layout.ep_size, "expert_dp": self.layout.expert_dp},
            "predicted": {
                "components": {name: self.prediction.components[name] for name in WORDS},
                "peak_bytes": self.prediction.peak_bytes,
                "allocated_bytes": self.prediction.allocated_bytes,
                "moment": self.prediction.moment,
            },
            "capacity_bytes": self.verdict.capacity_bytes,
            "reserve_bytes": self.verdict.reserve_bytes,
            "verdict": self.verdict.name,
        }


def plan_run(
    config: RunConfig,
    model_config: Mapping[str, Any],
    *,
    world_size: int,
    device_type: str,
    capacity_bytes: int,
    tokens: int,
    label_tokens: int,
    examples: int,
    kernel: str,
    num_parameters: int,
) -> RunPlan:
    """Predict exactly this run, with the formulas: no torch, milliseconds.

    Args:
        config: its options.
        model_config: the entries of the model's config.json.
        world_size: ranks.
        device_type: `cuda` or `cpu`.
        capacity_bytes: memory of a rank's device; on a CPU what a rank may take.
        tokens: of the largest micro-batch.
        label_tokens: of these, those whose next token is learned.
        examples: in that micro-batch.
        kernel: the backend that was chosen.
        num_parameters: of the model that will be trained, adapters left out.

    Raises:
        ConfigurationError: a family that cannot be planned, a value with which there is no model,
            or a model that is not what its config.json says to the planner.
    """
    shape = read_shape(config, model_config)
    if shape.num_parameters != num_parameters:
        raise ConfigurationError(
            f"the model has {num_parameters:,} parameters, but a {shape.model_type} model with "
            f"its config.json would have {shape.num_parameters:,}."
        )
    scenario = Scenario(
        config=config,
        shape=shape,
        world_size=world_size,
        device_type=device_type,
        kernel=kernel,
        tokens=tokens,
        label_tokens=label_tokens,
        examples=examples,
    )
    layout = scenario.own_layout()
    prediction = scenario.predict(layout)
    return RunPlan(scenario, layout, prediction, judge(prediction, capacity_bytes, device_type))
