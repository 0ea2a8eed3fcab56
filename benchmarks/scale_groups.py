"""Which layout and how many HSDP groups win on 64, 512 and 4096 GPUs, on paper.

    PYTHONPATH=. python -m benchmarks.scale_groups [a folder of benchmarks/models ...]

Models that the formulas do not know are rehearsed, with ep_size 8 and 16 and groups of all or 64
GPUs alone: minutes of CPU.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.harness.provenance import build_provenance, describe_provenance
from benchmarks.scale_ranks import be_quiet, rehearse_first
from megablocks_utils.byte_units import GB
from megablocks_utils.plan import build_request, open_model
from megablocks_utils.planning.memory.verdict import OOM
from megablocks_utils.planning.plan_options import parse_plan_options
from megablocks_utils.planning.speed.layout_plan import PlanRequest, PlanRow, plan_layouts
from megablocks_utils.planning.speed.step_cost import RESOLUTION

__all__ = ["Candidate", "choose", "list_candidates"]

MODELS = ("mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b", "qwen3.5-35b-a3b")
WORLD_SIZES = (64, 512, 4096)
REHEARSED_EP_SIZES = (8, 16)
"""Of models that the formulas do not know: in a node, and over two."""
GPUS_PER_NODE = 8
RUN = "--gpu h100-80g --per_device_train_batch_size 1 --max_seq_length 4096"
PAGE = Path(__file__).parent / "results" / "scale.md"
MARK = "<!-- From here on written by python -m benchmarks.scale_groups -->"
END = "<!-- Until here: groups -->"
VERSIONS = ("torch", "transformers")
HEAD = (
    "| model | GPUs | groups | layout | peak, GB | all-to-all | all-gather, reduce-scatter | "
    "all-reduce | regime | without groups |\n|---|---:|---:|---|---:|---:|---:|---:|---|---|"
)


@dataclass(frozen=True)
class Candidate:
    """A row of a plan, and the number of groups that it is for."""

    num_groups: int
    row: PlanRow


def list_candidates(request: PlanRequest, world_size: int) -> Iterator[Candidate]:
    """Plan all layouts for all numbers of groups that are whole nodes."""
    is_known = not request.scenario.shape.not_known
    shard_sizes = [world_size // 2**n for n in range(12) if world_size // 2**n >= GPUS_PER_NODE]
    if not is_known:
        shard_sizes = sorted({world_size, 64})
    for shard_size in shard_sizes:
        num_groups = world_size // shard_size
        scenario = replace(request.scenario, world_size=world_size).with_groups(num_groups)
        for ep_size in (None,) if is_known else REHEARSED_EP_SIZES:
            asked = replace(request, scenario=scenario, ep_size=ep_size)
            for row in plan_layouts(asked, with_remedies=False):
                yield Candidate(num_groups, row)


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Choose the fastest that fits, the leanest of those that cannot be told apart."""
    fitting = [one for one in candidates if one.row.verdict.name != OOM]
    limit = min((one.row.cost.micro_step for one in fitting), default=0) * (1 + RESOLUTION)
    near = [one for one in fitting if one.row.cost.micro_step <= limit]
    return min(near, key=lambda one: one.row.prediction.peak_bytes, default=None)


def format_row(model: str, world_size: int, candidates: Sequence[Candidate]) -> str:
    """Return the line of one model on so many GPUs."""
    best, cells = choose(candidates), [model, f"{world_size:,}"]
    if best is None:
        return f"| {' | '.join([*cells, '', 'none fits', *[''] * 6])} |"
    plain = choose([one for one in candidates if one.num_groups == 1])
    row, links = best.row, best.row.cost.links
    gathered = links["all_gather"].inter_bytes + links["reduce_scatter"].inter_bytes
    sent = (links["all_to_all"].inter_bytes, gathered, links["all_reduce"].inter_bytes)
    cells += [f"{best.num_groups:,}", row.layout.describe()]
    cells += [f"{row.prediction.peak_bytes / GB:.1f}", *(f"{part / GB:.1f}" for part in sent)]
    slower = plain and plain.row.cost.micro_step / row.cost.micro_step
    cells += [row.cost.regime, "none fits" if slower is None else f"x {slower:.2f}"]
    return f"| {' | '.join(cells)} |"


def plan_model(model: str) -> list[str]:
    """Return the lines of one model."""
    path = Path(__file__).parent / "models" / model
    options = parse_plan_options([str(path), "--gpus", "64", *RUN.split()])
    with open_model(options) as opened:
        if opened.rehearse is not None:
            opened = replace(opened, rehearse=partial(rehearse_first, model))
        request = build_request(options, opened)
        return [
            format_row(model, world_size, list(list_candidates(request, world_size)))
            for world_size in WORLD_SIZES
        ]


def main(argv: Sequence[str]) -> None:
    """Write the lines of the models into the page; those of others stay."""
    be_quiet()
    gc.disable()
    new = {model: plan_model(model) for model in argv or MODELS}
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    table, _, tail = rest.partition(END)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    old = {model: [line for line in lines if f"| {model} |" in line] for model in MODELS}
    rows = [row for model in MODELS for row in new.get(model, old[model])]
    provenance = build_provenance("benchmarks.scale_groups", argv)
    versions = ", ".join(f"{name} {provenance['versions'][name]}" for name in VERSIONS)
    told = f"{describe_provenance(provenance)}, {versions}."
    PAGE.write_text(
        "\n".join([head + MARK, "", HEAD, *rows, "", told, "", END]) + tail, encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
