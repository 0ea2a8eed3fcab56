"""Which layout is faster: a ranking, and what holds a layout up. Its seconds are never shown.

A micro-step takes

    max(compute, launches + weights on their way) + tokens on their way

Weights are gathered ahead while the GPU computes, but not faster than the host launches kernels;
tokens are waited for. Source: the seven timed rows of the published table (Mixtral-8x7B, 8 A100,
about 210 tokens a rank) fit `time = launches + bytes / bandwidth` within 5 %; the terms with the
constants below give their order, not their seconds, and no other run has been compared yet.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megablocks_utils.planning.memory.scenario import Scenario
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import ParallelLayout, Prediction
from megablocks_utils.planning.speed.calibration import Calibration
from megablocks_utils.planning.speed.traffic_links import Cluster, LinkTraffic, split_traffic

__all__ = [
    "ACHIEVED_BANDWIDTH",
    "ACHIEVED_FLOPS",
    "LAUNCH_S_PER_LAYER",
    "RESOLUTION",
    "StepCost",
    "cost_step",
    "rank_costs",
]

ACHIEVED_BANDWIDTH = 0.77
"""Of a link's speed. Source: 230 of 300 GB/s, usual for NCCL's all-gather on 8 A100."""
ACHIEVED_FLOPS = 0.4
"""Of the peak. Source: usual for dense fine-tuning on A100; at few tokens it is less."""
LAUNCH_S_PER_LAYER = 0.017
"""Source: the published rows with expert parallelism, 0.52 to 0.55 s a micro-step in 32 layers
whatever is trained, if their runtime was 100 optimizer steps as is likely."""
RESOLUTION = 0.05
"""Costs this near to each other are not told apart: the errors of the fit above."""

_REGIMES = {
    "launch": "launch bound",
    "compute": "compute bound",
    "weights": "all-gather bound",
    "tokens": "all-to-all bound",
    "tp": "tensor-parallel bound",
}
_GATHERED = ("all_gather", "reduce_scatter")


@dataclass(frozen=True)
class StepCost:
    """Say what a micro-step is made of, and where its bytes go.

    Attributes:
        terms: seconds by the model above: `launch`, `compute`, `weights`, `tokens`, and `tp`: what
            ranks of a tp group exchange, which is waited for as tokens are.
        links: traffic of an optimizer step by kind of collective.
        step_s: seconds of an optimizer step by measurement; None without a calibration.
        micro_step: what micro-steps are compared by.
    """

    terms: Mapping[str, float]
    links: Mapping[str, LinkTraffic]
    step_s: float | None
    micro_step: float

    @property
    def regime(self) -> str:
        """What holds it up, in words."""
        term = max(self.terms, key=self.terms.__getitem__)
        of_copies = self.links["all_reduce"].ideal_s
        if term == "weights" and of_copies > sum(self.links[n].ideal_s for n in _GATHERED):
            return "all-reduce bound"
        return _REGIMES[term]

    @property
    def intra_bytes(self) -> int:
        """Bytes a rank sends within its node in an optimizer step."""
        return round(sum(link.intra_bytes for link in self.links.values()))

    @property
    def inter_bytes(self) -> int:
        """Bytes a rank sends to other nodes in an optimizer step."""
        return round(sum(link.inter_bytes for link in self.links.values()))


def cost_step(
    scenario: Scenario,
    layout: ParallelLayout,
    prediction: Prediction,
    cluster: Cluster,
    calibration: Calibration | None = None,
) -> StepCost:
    """Cost a step of one layout, by the model or by what was measured on the user's node."""
    accumulation = scenario.config.optim.gradient_accumulation_steps
    links = split_traffic(prediction, cluster)
    flops = count_flops(scenario, layout)
    tp_s = _time_tp(scenario, prediction, cluster)
    tokens_s = links["all_to_all"].ideal_s
    weights_s = sum(link.ideal_s for link in links.values()) - tokens_s - tp_s
    terms = {
        "launch": LAUNCH_S_PER_LAYER * scenario.shape.num_layers,
        "compute": flops / (cluster.gpu.peak_flops * ACHIEVED_FLOPS),
        "weights": weights_s / ACHIEVED_BANDWIDTH / accumulation,
        "tokens": tokens_s / ACHIEVED_BANDWIDTH / accumulation,
        "tp": tp_s / ACHIEVED_BANDWIDTH / accumulation,
    }
    if calibration is None:
        busy = max(terms["compute"], terms["launch"] + terms["weights"])
        return StepCost(terms, links, None, busy + terms["tokens"] + terms["tp"])
    sent = prediction.sent_bytes_per_step
    step_s = calibration.step_s(sum(sent.values()), accumulation)
    own = "launch" if terms["launch"] > terms["compute"] else "compute"
    tokens_s = sent["all_to_all"] / calibration.bytes_per_s / accumulation
    terms = {
        own: calibration.overhead_s,
        "weights": step_s / accumulation - calibration.overhead_s - tokens_s,
        "tokens": tokens_s,
    }
    return StepCost(terms, links, step_s, step_s / accumulation)


def rank_costs(
    costs: Mapping[ParallelLayout, float], peaks: Mapping[ParallelLayout, int]
) -> list[ParallelLayout]:
    """Order layouts from fast to slow; of those that cannot be told apart, the leaner first."""
    left, ranked = sorted(costs, key=costs.__getitem__), []
    while left:
        limit = costs[left[0]] * (1 + RESOLUTION)
        group = [layout for layout in left if costs[layout] <= limit]
        ranked += sorted(group, key=peaks.__getitem__)
        left = left[len(group) :]
    return ranked


def _time_tp(scenario: Scenario, prediction: Prediction, cluster: Cluster) -> float:
    """Return the seconds of what the ranks of a tp group gather and reduce, and wait for."""
    tp_size = scenario.config.parallel.tp_size
    if tp_size == 1:
        return 0.0
    within = (p for p in prediction.sent if (p.size, p.stride) == (tp_size, 1))
    own = replace(prediction, sent=tuple(p for p in within if p.kind != "all_to_all"))
    return sum(link.ideal_s for link in split_traffic(own, cluster).values())


def count_flops(scenario: Scenario, layout: ParallelLayout) -> float:
    """Count the operations of a micro-step on the rank whose experts have most to do.

    Two a weight and token forward, twice that backward, half of it where weights are frozen, and
    forward again where it is recomputed.
    """
    shape, config = scenario.shape, scenario.config
    experts = shape.num_expert_parameters * shape.top_k / shape.num_experts
    dense = shape.num_active_parameters - experts
    if not shape.is_tied:
        dense -= shape.vocab_size * shape.hidden_size  # the embedding is looked up
    imbalance = scenario.imbalance if layout.ep_size > 1 else 1.0
    forward = scenario.rank_tokens * (
        2 * (dense + experts * imbalance) + _attention_flops(scenario)
    )
    forward /= config.parallel.tp_size  # of the same tokens each rank has its part of the work
    passes = 2 if config.adapter.has_lora else 3
    return forward * (passes + (config.gradient_checkpointing != "none"))


def _attention_flops(scenario: Scenario) -> float:
    """Count those of scores and values, of one token in all layers; it sees half of the others."""
    shape: ModelShape = scenario.shape
    attention = shape.attention
    if attention is None:
        return 0.0
    config = scenario.config
    length = min(config.data.max_seq_length, config.row_tokens) / 2
    if attention.sliding_window is not None:
        length = min(length, attention.sliding_window)
    per_head = 2 * length * (attention.head_dim + attention.v_head_dim)
    return shape.num_layers * attention.num_heads * per_head
