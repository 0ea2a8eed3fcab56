"""Four public models on 8 to 4096 GPUs, on paper: their tables and picture.

    PYTHONPATH=. python -m benchmarks.scale

Nothing is measured: the formulas of `megablocks_utils.plan` answer in seconds.
"""

from pathlib import Path

from megablocks_utils.byte_units import GB
from megablocks_utils.plan import build_request, open_model
from megablocks_utils.planning.plan_options import parse_plan_options
from megablocks_utils.planning.report.scale_chart import draw_scale
from megablocks_utils.planning.speed.layout_plan import PlanRequest
from megablocks_utils.planning.speed.scale import ScalePoint, describe_dominance, plan_scale

MODELS = {
    "Mixtral-8x7B": "mixtral-8x7b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "DeepSeek-V3": "deepseek-v3",
}
RUN = "--gpus 8..4096 --gpu h100-80g --per_device_train_batch_size 1 --max_seq_length 4096"
PAGE = Path(__file__).parent / "results" / "scale.md"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scale.png"
MARK = "<!-- From here on written by python -m benchmarks.scale -->"


def ask(folder: str) -> tuple[PlanRequest, list[ScalePoint]]:
    """Plan one of the models in `benchmarks/models`."""
    path = Path(__file__).parent / "models" / folder
    options = parse_plan_options([str(path), *RUN.split()])
    with open_model(options) as model:
        request = build_request(options, model)
        return request, plan_scale(request, options.world_sizes)


def format_table(points: list[ScalePoint]) -> str:
    """Return the Markdown table of one model."""
    head = "| GPUs | layout | peak, GB | verdict | sent in the node | to other nodes | regime |"
    rows = [head, "|---:|---|---:|---|---:|---:|---|"]
    for point in points:
        row = point.shown
        steps = row.accumulation * GB
        rows.append(
            f"| {point.world_size:,} | {row.layout.describe()} | "
            f"{row.prediction.peak_bytes / GB:.1f} | {row.verdict.name} | "
            f"{row.cost.intra_bytes / steps:.1f} | {row.cost.inter_bytes / steps:.1f} | "
            f"{row.cost.regime} |"
        )
    return "\n".join(rows)


def format_section(name: str, points: list[ScalePoint]) -> str:
    """Return what the page says of one model."""
    return f"## {name}\n\n{format_table(points)}\n\n{describe_dominance(points)}\n"


def main() -> None:
    """Draw the picture and write the tables into the page."""
    series, capacity = {}, 0
    for name, folder in MODELS.items():
        request, series[name] = ask(folder)
        capacity = request.capacity_bytes
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    sections = [format_section(name, points) for name, points in series.items()]
    PAGE.write_text("\n".join([head + MARK + "\n", *sections]), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    draw_scale(series, capacity, PICTURE)


if __name__ == "__main__":
    main()
