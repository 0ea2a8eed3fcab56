"""What a person reads, at every width."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from megablocks_utils.planning.model.units import choose_unit
from megablocks_utils.planning.report.tables import show_plan, show_scale
from megablocks_utils.planning.speed.calibration import Calibration
from megablocks_utils.planning.speed.layout_plan import PlanRequest, choose_row, plan_layouts
from megablocks_utils.planning.speed.scale import plan_scale
from tests.planning.cases import A100_NODE, PUBLISHED, build_scenario

GB = 10**9
PLAN_REQUEST = PlanRequest(
    "org/moe", "org/moe", build_scenario(), A100_NODE, A100_NODE.gpu.memory_bytes, ("--seed", "3")
)


def show(request=PLAN_REQUEST, width=120, assumptions=("It is so.",), **changes):
    request = replace(request, **changes)
    rows = plan_layouts(request)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    show_plan(console, request, rows, assumptions)
    return rows, console.file.getvalue()


def cells_of(text, row):
    """The cells of a row in both tables."""
    start = rf"^[> ]*{row.layout.ep_size} +{row.layout.expert_dp} "
    lines = [line for line in text.splitlines() if re.match(start, line)]
    return [re.split(r"  +", line.strip().removeprefix("> ")) for line in lines]


def test_every_row_with_all_its_figures():
    rows, text = show()
    format_gib = choose_unit(100 * GB).format_binary
    for row in rows:
        memory, speed = cells_of(text, row)
        parts = [format_gib(size) for size in row.prediction.components.values()]
        assert memory[2:8] == parts
        assert memory[8] == format_gib(row.prediction.peak_bytes)
        assert float(memory[9]) == pytest.approx(row.prediction.peak_bytes / GB, abs=0.05)
        assert memory[10:] == [
            format_gib(row.verdict.headroom_bytes),
            row.verdict.name.upper(),
            row.verdict.cause,
        ]
        assert speed[-3] == ("-" if row.rank is None else str(row.rank))
        assert speed[-1] == row.cost.regime
    assert "speed at 256 tokens a rank" in text


def test_the_choice_its_command_and_what_would_help():
    rows, text = show()
    chosen = choose_row(rows)
    assert f"Chosen: {chosen.layout.describe()} (the fastest that fits; " in text
    command = re.search(r"^torchrun .*?(?<!\\)$", text, flags=re.MULTILINE | re.DOTALL)[0]
    assert re.sub(r" \\\n +", " ", command) == chosen.launch
    assert chosen.launch.endswith(" --seed 3")
    for row in rows:
        assert (row.verdict.name == "oom") == bool(row.remedies)
        if row.remedies:
            assert f"{row.layout.describe()}: {row.remedies[0]}" in " ".join(text.split())
    assert text.rstrip().endswith("- It is so.")


def test_nothing_fits():
    _, text = show(capacity_bytes=2 * GB, ep_size=1)
    assert "No row fits: the leanest, " in text
    assert "torchrun" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 99, 100, 120, 200])
def test_lines_stay_in_the_width(width):
    """But commands, which are to be copied."""
    _, text = show(width=width)
    command = re.search(r"^torchrun .*?(?<!\\)$", text, flags=re.MULTILINE | re.DOTALL)[0]
    assert max(map(len, text.replace(command, "").splitlines())) <= width
    assert max(map(len, command.splitlines())) <= 100
    words = " ".join(text.split())
    assert "FITS" in words and "OOM" in words


def test_seconds_only_with_a_calibration():
    rows, text = show()
    assert "second" not in text
    assert {row.cost.step_s for row in rows} == {None}
    calibration = Calibration(bytes_per_s=1e11, overhead_s=0.5, workload={})
    rows, text = show(calibration=calibration)
    for row in rows:
        sent = sum(row.prediction.sent_bytes_per_step.values())
        seconds = 16 * 0.5 + sent / 1e11
        assert row.as_record()["step_s_estimate"] == pytest.approx(seconds)
        assert cells_of(text, row)[1][-2] == f"{seconds:.2f}"


def test_the_title_says_what_is_planned():
    _, text = show()
    assert text.startswith(
        "org/moe: 46.7 B parameters, 12.9 B active, on 8 x 85.0 GB (a100-80g); all weights, bf16, "
    )
    assert "8 x 60.0 GB (links of a100-80g);" in show(capacity_bytes=60 * GB)[1]
    line = f"{PUBLISHED} --use_lora all --lora_r 4"
    assert "LoRA all r4, bf16" in show(scenario=build_scenario(line))[1].splitlines()[0]
    packed = show(scenario=build_scenario(f"{line} --expert_quantization nf4"))[1]
    assert "LoRA all r4, experts in nf4, bf16" in " ".join(packed[:200].split())


def test_nodes_have_a_column_where_there_are_some():
    assert "to other" not in show()[1]
    assert "to other" in show(scenario=build_scenario(world_size=16))[1]


@pytest.mark.parametrize("width", [60, 120])
def test_a_line_for_every_number_of_gpus(width):
    points = plan_scale(PLAN_REQUEST, (8, 16, 32))
    console = Console(width=width, file=io.StringIO(), highlight=False)
    show_scale(console, PLAN_REQUEST, points, ["It is so."])
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for point in points:
        assert re.search(rf"^ +{point.world_size} ", text, flags=re.MULTILINE)
    if width == 120:
        shown = points[2].shown
        line = next(line for line in text.splitlines() if re.match(" +32 ", line))
        cells = re.split(r"  +", line.strip())
        assert cells[1] == shown.layout.describe()
        assert cells[2:4] == [f"{shown.prediction.peak_bytes / GB:.1f}", "FITS"]
        assert cells[-1] == shown.cost.regime
