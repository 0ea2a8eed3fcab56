"""The plan of a run that is about to start: its peak, and whether it is possible at all."""

from dataclasses import dataclass
from typing import Any

from megablocks_utils.config import RunConfig
from megablocks_utils.planning.memory.remedies import find_remedies
from megablocks_utils.planning.memory.scenario import Scenario
from megablocks_utils.planning.memory.verdict import WORDS, Verdict, judge
from megablocks_utils.planning.model.model_shape import ModelShape
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
        host_bytes = self.prediction.host_bytes
        return (
            f"peak {format_gb(self.verdict.peak_bytes)} in the {self.prediction.moment} "
            f"({of_it} {self.verdict.cause}) of {format_gb(self.verdict.capacity_bytes)}: "
            f"{self.verdict.name}"
            + (f"; {format_gb(host_bytes)} in host memory" if host_bytes else "")
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
                "host_bytes": self.prediction.host_bytes,
            },
            "capacity_bytes": self.verdict.capacity_bytes,
            "reserve_bytes": self.verdict.reserve_bytes,
            "verdict": self.verdict.name,
        }


def plan_run(
    config: RunConfig,
    shape: ModelShape,
    *,
    world_size: int,
    device_type: str,
    capacity_bytes: int,
    tokens: int,
    label_tokens: int,
    examples: int,
    packing: str,
    kernel: str,
    is_varlen: bool = False,
    has_whole_logits: bool = False,
) -> RunPlan:
    """Predict exactly this run, with the formulas: no torch, milliseconds.

    Args:
        config: its options.
        shape: of the model that will be trained, without adapters.
        world_size: ranks.
        device_type: `cuda` or `cpu`.
        capacity_bytes: memory of a rank's device; on a CPU what a rank may take.
        tokens: of the largest micro-batch, padding included.
        label_tokens: of these, those whose next token is learned.
        examples: in that micro-batch.
        packing: how they are laid out.
        kernel: the backend that was chosen.
        is_varlen: whether attention takes examples one by one, without a mask.
        has_whole_logits: whether the loss takes the logits of all labels at once.

    Raises:
        ConfigurationError: the formulas do not know the model, or how it is split.
    """
    scenario = Scenario(
        config=config,
        shape=shape,
        world_size=world_size,
        device_type=device_type,
        kernel=kernel,
        tokens=tokens,
        label_tokens=label_tokens,
        examples=examples,
        packing=packing,
        is_varlen=is_varlen,
        has_whole_logits=has_whole_logits,
    )
    layout = scenario.own_layout()
    prediction = scenario.predict(layout)
    return RunPlan(scenario, layout, prediction, judge(prediction, capacity_bytes, device_type))
