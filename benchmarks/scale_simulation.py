"""Play ranks of 64 to 4096, and compare what they send with the plan, by link.

    PYTHONPATH=. python -m benchmarks.scale_simulation

The first, a middle and the last rank take the training step with meshes, shards and FSDP units of
their own, on tensors without memory and a fake process group. What each sends is counted by the
ranks that the collective's group really has.
"""

import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megablocks_utils.byte_units import GB
from megablocks_utils.config import parse_args
from megablocks_utils.planning.memory.scenario import Scenario, read_shape
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.model.prediction import COLLECTIVES, ParallelLayout
from megablocks_utils.planning.speed.traffic_links import Cluster, split_traffic
from megablocks_utils.rehearsal.fewer_layers import rehearse_few_layers
from megablocks_utils.rehearsal.library_patches import large_on_meta
from megablocks_utils.rehearsal.traffic_counter import Route
from megablocks_utils.training.model_source import build_bare_model

__all__ = ["NODE", "Case", "Compared", "compare", "plan_links", "split_by_link"]

NODE = Cluster(GPUS["h100-80g"], 8)
MODELS = Path(__file__).parent / "models"
PAGE = Path(__file__).parent / "results" / "scale.md"
MARK = "<!-- From here on written by python -m benchmarks.scale_simulation -->"
END = "<!-- Until here -->"
WORLD_SIZES = (64, 512, 4096)
TOKENS = 4096
RUN = f"--per_device_train_batch_size 1 --max_seq_length {TOKENS} --precision bf16"

Links = Mapping[tuple[str, str], int]
"""Bytes by kind of collective and `intra` or `inter`, rounded."""


@dataclass(frozen=True)
class Case:
    """One run to be played.

    Attributes:
        model: folder in `benchmarks/models`.
        world_size: ranks.
        layout: how the experts are spread.
        num_groups: groups of ranks that each hold the whole model.
    """

    model: str
    world_size: int
    layout: ParallelLayout
    num_groups: int = 1

    def describe(self) -> str:
        """Say the layout in a few words."""
        groups = f", {self.num_groups} groups" if self.num_groups > 1 else ""
        return self.layout.describe() + groups

    def scenario(self) -> Scenario:
        """Return what is planned."""
        line = f"{RUN} --dp_replicate_size {self.num_groups}"
        config = parse_args(line.split(), entry_point="fsdp2")
        settings = json.loads((MODELS / self.model / "config.json").read_text(encoding="utf-8"))
        return Scenario(
            config=config,
            shape=read_shape(config, settings),
            world_size=self.world_size,
            device_type="cuda",
            kernel="grouped_mm",
            tokens=TOKENS,
            label_tokens=TOKENS,
        )


@dataclass(frozen=True)
class Compared:
    """What one rank sends in a step, by the plan and by the simulation."""

    case: Case
    rank: int
    planned: Links
    played: Links

    def off_by(self, kind: str) -> int:
        """Return the bytes that the simulation sends beyond the plan, whatever the link."""
        return sum(
            self.played[kind, link] - self.planned[kind, link] for link in ("intra", "inter")
        )

    def off_by_link(self, kind: str) -> int:
        """Return the largest difference on a link."""
        links = ("intra", "inter")
        return max(abs(self.played[kind, link] - self.planned[kind, link]) for link in links)


def list_cases() -> Iterator[Case]:
    """List the runs: ep groups of a node and larger ones, shards and copies, with HSDP."""
    for world_size in WORLD_SIZES:
        yield Case("mixtral-8x7b", world_size, ParallelLayout(8, "replicate"))
        yield Case("mixtral-8x7b", world_size, ParallelLayout(8, "shard"), world_size // 8)
        yield Case("qwen3-235b-a22b", world_size, ParallelLayout(8, "shard"))
        yield Case("qwen3-235b-a22b", world_size, ParallelLayout(32, "shard"), world_size // 32)


def compare(case: Case, rank: int) -> Compared:
    """Play one rank, and plan the same."""
    scenario = case.scenario()
    run, model = scenario.planned_run(), _build(case.model)
    device = torch.device("cpu")
    played = rehearse_few_layers(model, case.layout, run, device=device, rank=rank).sent
    return Compared(case, rank, plan_links(case), split_by_link(played, rank, NODE.gpus_per_node))


def plan_links(case: Case) -> Links:
    """Return what the plan says."""
    scenario = case.scenario()
    traffic = split_traffic(scenario.predict(case.layout), NODE)
    links: dict[tuple[str, str], int] = {}
    for kind in COLLECTIVES:
        links[kind, "intra"] = round(traffic[kind].intra_bytes)
        links[kind, "inter"] = round(traffic[kind].inter_bytes)
    return links


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


@lru_cache(maxsize=1)
def _build(model: str) -> PreTrainedModel:
    with large_on_meta():
        return build_bare_model(MODELS / model, torch.bfloat16, torch.bfloat16)


def format_row(compared: list[Compared]) -> str:
    """Return the line of one run: what rank 0 sends, and how far all are from the plan."""
    first, case = compared[0], compared[0].case
    rest = [kind for kind in COLLECTIVES if kind != "all_to_all"]
    sent = [
        f"{sum(first.played[kind, link] for kind in kinds) / GB:.2f}"
        for kinds in (rest, ["all_to_all"])
        for link in ("intra", "inter")
    ]
    off = max(one.off_by_link(kind) for one in compared for kind in rest)
    tokens = [one.off_by("all_to_all") for one in compared]
    cells = [case.model, f"{case.world_size:,}", case.describe(), *sent, f"{off:,}"]
    cells += [f"{tokens[0]:,}", f"{max(tokens):,}"]
    cells += [f"{max(one.off_by_link('all_to_all') for one in compared):,}"]
    return f"| {' | '.join(cells)} |"


HEAD = """| model | GPUs | layout | weights, in the node | to others | tokens, in the node \
| to others | weights: off on a link | tokens: off, rank 0 | off, most | off on a link |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    """Play all runs, and write the page's table."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")  # of libraries, about a process that nobody has launched
    logging.disable(logging.WARNING)
    start, rows, num_played = time.perf_counter(), [], 0
    for case in sorted(list_cases(), key=lambda case: (case.model, case.world_size)):
        middle = () if case.world_size == max(WORLD_SIZES) else (case.world_size // 2 + 3,)
        compared = [compare(case, rank) for rank in (0, *middle, case.world_size - 1)]
        rows.append(format_row(compared))
        num_played += len(compared)
    seconds = time.perf_counter() - start
    took = f"{num_played} rank steps, {seconds:.0f} s on a shared CPU core."
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    tail = rest.partition(END)[2]
    table = "\n".join([MARK, "", HEAD, *rows, "", took, "", END])
    PAGE.write_text(head + table + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
