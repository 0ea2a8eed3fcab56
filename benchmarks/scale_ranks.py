"""Play one rank of many on a fake process group, beside what the plan says that it sends."""

import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from transformers import PreTrainedModel

from megablocks_utils.config import RunConfig, parse_args
from megablocks_utils.config.dispatch_cost import ROUTING_BYTES, WEIGHT_GRADIENT_BYTES
from megablocks_utils.planning.memory.scenario import Scenario, read_shape
from megablocks_utils.planning.memory.sizes import INDEX, Sizes
from megablocks_utils.planning.model.config_values import KNOWN_MODEL_TYPES
from megablocks_utils.planning.model.described_shape import shape_of
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import (
    COLLECTIVES,
    ParallelLayout,
    PlannedRun,
    Prediction,
)
from megablocks_utils.planning.speed.traffic_links import Cluster, split_traffic
from megablocks_utils.rehearsal.fewer_layers import rehearse_few_layers
from megablocks_utils.rehearsal.library_patches import large_on_meta
from megablocks_utils.rehearsal.rehearse import Rehearsal
from megablocks_utils.rehearsal.traffic_counter import Route
from megablocks_utils.training.describe_model import describe_model
from megablocks_utils.training.model_source import build_bare_model
from megablocks_utils.training.step import stochastic_rounding

__all__ = [
    "CPU",
    "LINKS",
    "NODE",
    "Case",
    "Compared",
    "build",
    "compare",
    "be_quiet",
    "rehearse_first",
    "split_by_link",
]

NODE = Cluster(GPUS["h100-80g"], 8)
MODELS = Path(__file__).parent / "models"
CPU = torch.device("cpu")
LINKS = ("intra", "inter")
_RUN = "--per_device_train_batch_size 1 --precision bf16_sr --use_megablocks_sharding True"

Links = Mapping[tuple[str, str], int]
"""Bytes by kind of collective and link, rounded."""


@dataclass(frozen=True)
class Case:
    """One run to be played.

    Attributes:
        model: folder in `benchmarks/models`.
        world_size: ranks.
        layout: how the experts are spread.
        num_groups: groups of ranks that each hold the whole model.
        expert_tp_size: ranks that each expert is split over.
        tokens: of a rank.
    """

    model: str
    world_size: int
    layout: ParallelLayout
    num_groups: int = 1
    expert_tp_size: int = 1
    tokens: int = 4096

    def describe(self) -> str:
        """Say the layout in a few words."""
        slices = f", expert_tp_size {self.expert_tp_size}" if self.expert_tp_size > 1 else ""
        groups = f", {self.num_groups} groups" if self.num_groups > 1 else ""
        return self.layout.describe() + slices + groups

    def config(self) -> RunConfig:
        """Return the options of the run."""
        sizes = f"--max_seq_length {self.tokens} --ep_size {self.layout.ep_size}"
        sizes += f" --dp_replicate_size {self.num_groups} --expert_tp_size {self.expert_tp_size}"
        sizes += f" --expert_dp {self.layout.expert_dp}"
        return parse_args(f"{_RUN} {sizes}".split(), entry_point="fsdp2")

    def scenario(self) -> Scenario:
        """Return what is planned; what the formulas do not know is rehearsed."""
        return Scenario(
            config=self.config(),
            shape=_read_shape(self.model),
            world_size=self.world_size,
            device_type="cuda",
            kernel="grouped_mm",
            tokens=self.tokens,
            label_tokens=self.tokens,
            rehearse=lambda layout, run: rehearse_first(self.model, layout, run),
        )


@dataclass(frozen=True)
class Compared:
    """What one rank sends in a step, by the plan and by the simulation.

    Attributes:
        case: the run.
        rank: which one it is.
        planned: by the plan, which takes all peers of an all-to-all for equal.
        told_apart: the same, with the rows of the plan shared out in whole ones, as ranks do.
        played: by the simulation.
    """

    case: Case
    rank: int
    planned: Links
    told_apart: Links
    played: Links

    def find_difference(self, kinds: Sequence[str]) -> int:
        """Return the most that a link has too much or too little."""
        keys = [(kind, link) for kind in kinds for link in LINKS]
        return max(abs(self.played[key] - self.told_apart[key]) for key in keys)

    def find_rounding(self) -> int:
        """Return how far a link is from the plan, because rows are whole."""
        keys = [("all_to_all", link) for link in LINKS]
        return max(abs(self.played[key] - self.planned[key]) for key in keys)


def be_quiet() -> None:
    """Keep libraries from warning about a process that nobody has launched."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def compare(case: Case, rank: int) -> Compared:
    """Play one rank, and plan the same."""
    scenario = case.scenario()
    prediction = scenario.predict(case.layout)
    traffic = split_traffic(prediction, NODE)
    planned = {
        (kind, link): round(num_bytes)
        for kind in COLLECTIVES
        for link, num_bytes in zip(
            LINKS, (traffic[kind].intra_bytes, traffic[kind].inter_bytes), strict=True
        )
    }
    of_first, of_rank = (count_exchanged(case, prediction, number) for number in (0, rank))
    wanted = prediction.sent_bytes_per_step["all_to_all"]
    if sum(of_first.values()) != wanted:
        raise AssertionError(f"{case}: the plan says {wanted}, but its rows are {of_first}")
    played = play(case.model, case.layout, scenario.planned_run(), rank).sent
    return Compared(
        case, rank, planned, {**planned, **of_rank}, split_by_link(played, rank, NODE.gpus_per_node)
    )


@lru_cache(maxsize=16)  # by arguments as they are written: all by position
def play(model: str, layout: ParallelLayout, run: PlannedRun, rank: int) -> Rehearsal:
    """Take the step of one rank on tensors without memory."""
    with _without_waste():
        return rehearse_few_layers(build(model), layout, run, device=CPU, rank=rank)


def count_exchanged(case: Case, prediction: Prediction, rank: int) -> Links:
    """Return the bytes of the plan's all-to-all, told apart by the receivers' node.

    Rows are whole: where they do not divide, the first ranks of an ep group get one more, so that
    those behind them keep less. Without adapters: every layer sends back.
    """
    sizes = Sizes(_read_shape(case.model), case.layout, case.scenario().planned_run())
    ep_size, stride = case.layout.ep_size, case.expert_tp_size
    links = dict.fromkeys([("all_to_all", link) for link in LINKS], 0)
    # Other slices of the same experts, on the same node, get all rows of this one.
    over_slices = (part for part in prediction.sent if (part.size, part.stride) == (stride, 1))
    links["all_to_all", "intra"] += sum(
        part.num_bytes for part in over_slices if stride > 1 and part.kind == "all_to_all"
    )
    first = rank - rank // stride % ep_size * stride
    for position in range(ep_size):
        link = _link(rank, first + position * stride)
        if link is not None:
            links["all_to_all", link] += _count_sent_to(sizes, position)
    return links


def _link(sender: int, receiver: int) -> str | None:
    per_node = NODE.gpus_per_node
    if sender == receiver:
        return None
    return "intra" if sender // per_node == receiver // per_node else "inter"


def _count_sent_to(sizes: Sizes, position: int) -> int:
    """Return the bytes that a step sends to one member of an ep group."""
    shape, ep_size = sizes.shape, sizes.layout.ep_size

    def share(num_rows: int) -> int:
        return num_rows // ep_size + (position < num_rows % ep_size)

    num_passes = 3 if sizes.run.gradient_checkpointing == "full" else 2
    row_bytes = shape.hidden_size * sizes.compute
    sent = num_passes * (share(sizes.num_sent) + share(sizes.num_came)) * row_bytes
    sent += (shape.num_experts // ep_size + sizes.sends_tokens) * INDEX
    if sizes.sends_tokens:
        sent += share(sizes.num_routed) * ROUTING_BYTES
        sent += share(sizes.num_received) * WEIGHT_GRADIENT_BYTES
    return shape.num_moe_layers * sent


def split_by_link(sent: Mapping[Route, int], rank: int, gpus_per_node: int) -> Links:
    """Split what a rank sends by the nodes of the receivers.

    A ring goes from node to node once, so that of its members in a node one sends to another node:
    each gets its part of that, as in a plan.
    """
    links: Counter[tuple[str, str]] = Counter()
    exact: dict[tuple[str, str], Fraction] = {}
    node = rank // gpus_per_node
    for route, num_bytes in sent.items():
        near = sum(member // gpus_per_node == node for member in route.ranks)
        leaves = Fraction(near < len(route.ranks), 1 if route.kind == "all_to_all" else near)
        for link, share in (("inter", leaves), ("intra", 1 - leaves)):
            key = route.kind, link
            exact[key] = exact.get(key, Fraction()) + num_bytes * share
    links.update({key: round(num_bytes) for key, num_bytes in exact.items()})
    return links


@cache
def build(model: str) -> PreTrainedModel:
    """Return a model on meta."""
    with large_on_meta():
        return build_bare_model(MODELS / model, torch.bfloat16, torch.bfloat16)


@cache
def _read_shape(model: str) -> ModelShape:
    settings = json.loads((MODELS / model / "config.json").read_text(encoding="utf-8"))
    if settings["model_type"] in KNOWN_MODEL_TYPES:
        return read_shape(parse_args([], entry_point="fsdp2"), settings)
    return shape_of(describe_model(build(model)))


def rehearse_first(model: str, layout: ParallelLayout, run: PlannedRun) -> Prediction:
    """Predict by the step of rank 0 what the formulas do not know."""
    return play(model, layout, run, 0).as_prediction()


@contextmanager
def _without_waste() -> Iterator[None]:
    """Leave out what takes most of the time and changes no number, while entered.

    FSDP2 makes an empty shard for each rank beyond a parameter's rows: one serves them all. The
    optimizer's kernel for GPUs is taken as done, instead of its many small chunks on a CPU.
    """

    def chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
        chunks = list(torch.chunk(tensor, num_chunks, dim=dim))
        return chunks + [chunks[0].new_empty(0)] * (num_chunks - len(chunks))

    with (
        patch.object(_fsdp_param, "_chunk_with_empty", chunk),
        patch.object(stochastic_rounding, "_takes_kernel", lambda _: True),
        patch.object(stochastic_rounding.StochasticRoundingAdamW, "_run_kernel", lambda *_: None),
    ):
        yield
