"""The plan itself: a row for every layout, judged, ranked, with its command and what would help."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megablocks_utils.planning.memory.remedies import find_remedies
from megablocks_utils.planning.memory.scenario import Scenario
from megablocks_utils.planning.memory.verdict import FITS, OOM, TIGHT, Verdict, judge
from megablocks_utils.planning.model.prediction import (
    COLLECTIVES,
    COMPONENTS,
    ParallelLayout,
    Prediction,
)
from megablocks_utils.planning.speed.calibration import Calibration
from megablocks_utils.planning.speed.launch_lines import build_launch
from megablocks_utils.planning.speed.step_cost import StepCost, cost_step, rank_costs
from megablocks_utils.planning.speed.traffic_links import Cluster

__all__ = ["PlanRequest", "PlanRow", "choose_row", "plan_layouts"]


@dataclass(frozen=True)
class PlanRequest:
    """What is asked.

    Attributes:
        model: as it was named.
        launch_model: what a run would be given for it.
        scenario: the run.
        cluster: GPUs and nodes.
        capacity_bytes: memory of a GPU.
        words: the user's training options, without those of the layout and the model.
        ep_size: the only one asked for, or None.
        expert_dp: likewise.
        calibration: from the user's node, or None.
    """

    model: str
    launch_model: str
    scenario: Scenario
    cluster: Cluster
    capacity_bytes: int
    words: tuple[str, ...] = ()
    ep_size: int | None = None
    expert_dp: str | None = None
    calibration: Calibration | None = None

    def layouts(self) -> list[ParallelLayout]:
        """List the layouts that were asked for.

        Where one rank holds an expert, and without expert parallelism by name, both words fit.
        """
        slice_ranks = self.scenario.slice_ranks
        return [
            layout
            for layout in self.scenario.legal_layouts()
            if self.ep_size in (None, layout.ep_size)
            and (
                self.expert_dp is None
                or layout.ep_size == slice_ranks
                or self.ep_size == 1
                or (layout.ep_size > 1 and layout.expert_dp == self.expert_dp)
            )
        ]

    def launch(self, layout: ParallelLayout) -> str:
        """Return the command that starts a run in this layout."""
        return build_launch(
            self.launch_model,
            layout,
            entry_point=self.scenario.config.entry_point,
            gpus=self.scenario.world_size,
            gpus_per_node=self.cluster.gpus_per_node,
            words=list(self.words),
        )


@dataclass(frozen=True)
class PlanRow:
    """One layout, on the rank that needs most.

    Attributes:
        layout: how the experts are spread.
        prediction: bytes held and sent.
        verdict: whether they fit.
        cost: of a step, to rank by.
        accumulation: micro-steps of an optimizer step.
        rank: 1 is the fastest; None where it does not fit.
        relative_cost: time of a micro-step by the model, 1 for the fastest row that fits; None
            where none fits.
        launch: command that starts it.
        remedies: where it does not fit, what would make it.
    """

    layout: ParallelLayout
    prediction: Prediction
    verdict: Verdict
    cost: StepCost
    accumulation: int
    rank: int | None = None
    relative_cost: float | None = None
    launch: str | None = None
    remedies: tuple[str, ...] = ()

    def sent_bytes_per_micro_step(self) -> dict[str, int]:
        """Return what is sent by kind of collective, what happens once a step shared out."""
        sent = self.prediction.sent_bytes_per_step
        return {name: round(sent[name] / self.accumulation) for name in COLLECTIVES}

    def as_record(self) -> dict[str, Any]:
        """Return the row as it stands in the JSON file."""
        record = {
            "ep_size": self.layout.ep_size,
            "expert_dp": self.layout.expert_dp,
            "components": {name: self.prediction.components[name] for name in COMPONENTS},
            "peak_bytes": self.prediction.peak_bytes,
            "moment": self.prediction.moment,
            "reserve_bytes": self.verdict.reserve_bytes,
            "headroom_bytes": self.verdict.headroom_bytes,
            "allocated_bytes": self.prediction.allocated_bytes,
            "host_bytes": self.prediction.host_bytes,
            "sent_bytes_per_micro_step": self.sent_bytes_per_micro_step(),
            "sent_bytes_per_step": {n: self.prediction.sent_bytes_per_step[n] for n in COLLECTIVES},
            "sent_bytes_per_step_by_link": {
                "intra_node": self.cost.intra_bytes,
                "inter_node": self.cost.inter_bytes,
            },
            "verdict": self.verdict.name,
            "cause": self.verdict.cause,
            "rank": self.rank,
            "cost": self.relative_cost and round(self.relative_cost, 3),
            "regime": self.cost.regime,
            "launch": self.launch,
            "remedies": list(self.remedies),
        }
        if self.cost.step_s is not None:
            record["step_s_estimate"] = self.cost.step_s
        return record


def plan_layouts(request: PlanRequest, *, with_remedies: bool = True) -> list[PlanRow]:
    """Predict every layout that was asked for, judge it, and rank those that fit."""
    scenario, rows = request.scenario, []
    for layout in request.layouts():
        prediction = scenario.predict(layout)
        cost = cost_step(scenario, layout, prediction, request.cluster, request.calibration)
        verdict = judge(prediction, request.capacity_bytes, scenario.device_type)
        accumulation = scenario.config.optim.gradient_accumulation_steps
        rows.append(PlanRow(layout, prediction, verdict, cost, accumulation))
    ranks, best = _rank(rows)
    return [
        replace(
            row,
            rank=ranks.get(row.layout),
            relative_cost=row.cost.micro_step / best if row.layout in ranks and best else None,
            launch=request.launch(row.layout),
            remedies=_remedies(request, row) if with_remedies else (),
        )
        for row in rows
    ]


def choose_row(rows: Sequence[PlanRow]) -> PlanRow | None:
    """Choose the fastest row that fits; a tight one only where nothing else does."""
    ranked = sorted((row for row in rows if row.rank is not None), key=lambda row: row.rank or 0)
    by_verdict = [row for name in (FITS, TIGHT) for row in ranked if row.verdict.name == name]
    return by_verdict[0] if by_verdict else None


def _rank(rows: Sequence[PlanRow]) -> tuple[Mapping[ParallelLayout, int], float | None]:
    fitting = {row.layout: row for row in rows if row.verdict.name != OOM}
    costs = {layout: row.cost.micro_step for layout, row in fitting.items()}
    peaks = {layout: row.verdict.peak_bytes for layout, row in fitting.items()}
    order = rank_costs(costs, peaks)
    return {layout: place for place, layout in enumerate(order, 1)}, min(
        costs.values(), default=None
    )


def _remedies(request: PlanRequest, row: PlanRow) -> tuple[str, ...]:
    if row.verdict.name != OOM or request.scenario.not_known:
        return ()  # each attempt would be a rehearsal
    found = find_remedies(request.scenario, row.layout, request.capacity_bytes)
    return tuple(remedy.describe() for remedy in found)
