"""The numbers of the table and what a reader sees of them."""

import json
import multiprocessing
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.table import __main__ as table
from benchmarks.table import modes, one_gpu
from benchmarks.table.bench import CPU_SIZES, build_bench, read_published_model
from benchmarks.table.chart import build_figure
from benchmarks.table.markdown import write_markdown
from benchmarks.table.options import parse_options
from benchmarks.table.record import TableRecord
from benchmarks.table.rows import ROWS
from benchmarks.table.summary import compare_memory, compare_published, summarise_errors
from tests.support.rank_pool import start_forkserver

BY_NAME = {row.name: row for row in ROWS}
GB = 10**9


def run_of(micro_step_s, peak_bytes=50 * GB, **more):
    return {
        "status": "measured",
        "micro_step_s": micro_step_s,
        "tokens_per_s": [8 * 256 / seconds for seconds in micro_step_s],
        "tokens_per_rank": 256,
        "peak_bytes": peak_bytes,
        "allocated_bytes": 35 * GB,
        "first_loss": 2.5,
        "mesh": {"dp": 1, "ep": 8},
        "kernel": "triton",
    } | more


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A table as `--real` would fill it on 8 GPUs, with numbers made up here."""
    options = parse_options(["--real", "--rounds", "2", "--steps", "3"])
    made_up = {"peak_bytes": 48 * GB, "allocated_bytes": 36 * GB, "gradients_bytes": 11 * GB}
    made_up |= {"components": {}, "moment": "backward", "is_oom": False}
    copies = made_up | {"peak_bytes": 93 * GB, "is_oom": True}
    monkeypatch.setattr(
        "benchmarks.table.record.predict_row",
        lambda _, row: None if row.group == "transformers" else dict(_pick(row, made_up, copies)),
    )
    record = TableRecord(
        tmp_path / "table.json", ["--real"], rows=ROWS, bench=build_bench(options), method={}
    )
    for seconds in (1.8, 1.2):
        record.add_run(BY_NAME["full-none"], run_of([seconds] * 3))
    for seconds in ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5]):
        record.add_run(BY_NAME["full-ep8-triton"], run_of(seconds))
        record.add_run(BY_NAME["stock-full-ep8"], run_of([2 * s for s in seconds]))
    message = "torch.OutOfMemoryError: CUDA out of memory."
    record.add_run(BY_NAME["full-ep4"], {"status": "OOM", "reason": message, "exit_code": 1})
    missing = "scattermoe is not installed; install it with: pip install scattermoe"
    record.settle(BY_NAME["attn-ep4-scattermoe"], {"status": "not installed", "reason": missing})
    return record


def _pick(row, usual, copies):
    return copies if row.name == "full-ep4" else usual


def test_ratios_compare_runs_of_one_round(record):
    """Medians of the rounds: 0.6 and 0.4 s; without expert parallelism 1.8 and 1.2 s."""
    entry = record.entry(BY_NAME["full-ep8-triton"])
    assert entry["measured"]["micro_step_s"] == {"n": 6, "median": 0.5, "min": 0.3, "max": 0.7}
    no_ep = entry["ratios"]["no_ep"]
    assert no_ep["to"] == "full-none" and no_ep["published"] is None
    assert no_ep["measured"] == pytest.approx({"n": 2, "median": 3.0, "min": 3.0, "max": 3.0})
    assert entry["ratios"]["transformers"]["measured"]["median"] == pytest.approx(2.0)
    assert entry["ratios"]["transformers"]["to"] == "stock-full-ep8"
    published = record.entry(BY_NAME["full-ep8"])["ratios"]["no_ep"]["published"]
    assert published == pytest.approx(3037 / 871)
    assert "no_ep" not in record.entry(BY_NAME["all-ep4"])["ratios"]  # nobody published it


def test_tables_put_published_predicted_and_measured_side_by_side(record):
    text = write_markdown(record.content)
    time, memory = read_tables(text)
    assert "s a micro-step, published (inferred)" in time["row"]
    assert time["full-none"][:3] == ["1.90", "1.500 (1.200-1.800)", "1422 (1138-1707)"]
    assert time["full-ep8"] == ["0.54", "-", "-", "3.49", "-", "-"]
    assert time["full-ep4"][:3] == ["OOM", "OOM", "OOM"]
    assert time["full-ep8-triton"][-2:] == ["**3.00** (3.00-3.00)", "**2.00** (2.00-2.00)"]
    # 59 GB published, 48 predicted, 50 measured; gradients are no part of what is compared with a
    # measurement: 36 of 35.
    peak, allocated = ["59", "48.0", "50.0", "-4.0%"], ["47", "36.0", "35.0", "+2.9%"]
    assert memory["full-none"] == peak + allocated
    assert memory["full-ep4"][:4] == ["OOM", "93.0 (OOM)", "OOM", "-"]
    assert memory["attn-ep4-scattermoe"][:3] == ["25", "48.0", "not installed"]
    assert memory["stock-full-ep8"] == ["-", "-", "50.0", "-", "-", "-", "35.0", "-"]
    for note in (
        "`full-ep4`, OOM: torch.OutOfMemoryError: CUDA out of memory.",
        "`attn-ep4-scattermoe`, not installed: scattermoe is not installed; install it with: "
        "pip install scattermoe",
        "predicted against measured, peak: mean error 4.0%, worst -4.0% (n = 2)",
    ):
        assert note in text


def read_tables(text):
    """Return the cells of each Markdown table by the name of the row; `row` is the head."""
    tables = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "row":
            tables.append({})
        if len(cells) > 1 and not cells[0].startswith("---"):
            tables[-1][cells[0].partition(":")[0].strip("`")] = cells[1:]
    return tables


def test_plot_shows_the_medians_and_what_has_none(record):
    time_panel, memory_panel = build_figure(record.content).axes
    titles = [label.get_text() for label in time_panel.get_yticklabels()]
    bars = {titles[round(b.get_y() + 0.3)]: b.get_width() for b in time_panel.patches}
    assert bars == pytest.approx(
        {
            "full, no ep (FSDP2)": 1.5,
            "full, ep 8, triton": 0.5,
            "full, ep 8, transformers": 1.0,
        }
    )
    words = {titles[round(t.xy[1])]: t.get_text() for t in memory_panel.texts if t.get_text()}
    assert words == {
        "full, ep 4, copies, megablocks": "OOM, published: OOM",
        "LoRA r16 attn-only, ep 4, copies, scattermoe": "not installed",
    }


def test_published_figures_stand_only_beside_the_model_and_the_ranks_they_are_of(tmp_path):
    bench = build_bench(parse_options(["--real"]))
    assert bench.is_published
    assert not replace(bench, config={**bench.config, **CPU_SIZES}).is_published
    rows, path = [BY_NAME["full-none"], BY_NAME["full-ep8"]], tmp_path / "table.json"
    few = replace(bench, ranks=4)
    record = TableRecord(path, [], rows=rows, bench=few, method={})
    record.add_run(rows[0], run_of([1.0]))
    assert record.content["errors"]["published_error"]["peak"] is None
    text = write_markdown(record.content)
    time, memory = read_tables(text)
    assert "3.49" in time["full-ep8"]  # ratios stay: they are of no model and no machine
    assert "59" not in memory["full-none"] and "published (inferred)" not in text


def test_errors_are_those_of_the_part_that_is_predicted():
    """On a CPU, the base of the process is on both sides: 100 predicted, 80 of 380 measured."""
    predicted = {"peak_bytes": 100, "allocated_bytes": 40}
    measured = {"peak_bytes": 380, "base_peak_bytes": 300}
    measured |= {"allocated_bytes": 350, "base_allocated_bytes": 300}
    assert compare_memory(predicted, measured) == {
        "peak": {"predicted_bytes": 400, "error": 0.25},
        "allocated": {"predicted_bytes": 340, "error": pytest.approx(-0.2)},
    }
    assert summarise_errors([0.25, -0.5]) == {"n": 2, "mean": 0.375, "worst": -0.5}


def test_what_was_published_before_zero_grad_is_compared_with_gradients():
    predicted = {"peak_bytes": 59 * GB, "allocated_bytes": 36 * GB, "gradients_bytes": 11 * GB}
    assert compare_published(BY_NAME["full-none"], predicted) == {"peak": 0, "allocated": 0}
    assert compare_published(BY_NAME["full-ep8"], predicted)["allocated"] == 0
    assert compare_published(BY_NAME["full-ep4"], predicted) is None


def test_plan_predicts_the_published_memory(tmp_path):
    """Every peak within 12 % and never above; copies do not fit the card, shards take 50 GB."""
    path = tmp_path / "plan.json"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: plan -->\nold\n<!-- end -->\nafter\n")
    table.main(["--plan", "--output", str(path), "--docs", str(page)])
    text = path.with_suffix(".md").read_text()
    assert page.read_text() == (f"before\n<!-- table: plan -->\n\n{text}\n<!-- end -->\nafter\n")
    content = json.loads(path.read_text())
    by_name = {row["row"]: row for row in content["rows"]}
    assert content["errors"]["published_error"]["peak"]["n"] == 7
    assert abs(content["errors"]["published_error"]["peak"]["worst"]) < 0.12
    assert [name for name, row in by_name.items() if (row["predicted"] or {}).get("is_oom")] == [
        "full-ep4"
    ]
    assert by_name["full-ep4-shard"]["predicted"]["peak_bytes"] == pytest.approx(50e9, rel=0.05)
    # Pure bf16, all sharded over 8 ranks: weights, and both of Adam's moments.
    allocated = by_name["full-ep8"]["predicted"]["allocated_bytes"]
    assert allocated == pytest.approx(46_702_792_704 * (2 + 4) / 8, rel=0.005)
    assert "transformers" not in text.split("- predicted")[0]


# --- rank 0 of fake peers ---------------------------------------------------------------


def _rehearse(request, answer):
    with Path(answer).open("w") as written:
        one_gpu.main([], source=_Text(request), answer=written)


class _Text:
    """What can be sent to a process, and read there like a file."""

    def __init__(self, text):
        self.text = text

    def read(self):
        return self.text


def test_memory_on_one_device_is_near_the_prediction(tmp_path):
    """On a CPU, and forked: the imports of a fresh process would take seconds."""
    start_forkserver()

    def start(request):
        answer = tmp_path / "answer.json"
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_rehearse, args=(request, answer))
        process.start()
        process.join()
        return subprocess.CompletedProcess([], process.exitcode, answer.read_text(), "")

    rows = "full-ep8,stock-full-ep8"
    options = parse_options(["--one_gpu", "--rows", rows])
    options = replace(options, output=tmp_path / "table.json")
    sizes = read_published_model() | CPU_SIZES | {"hidden_size": 512, "intermediate_size": 1792}
    bench = replace(build_bench(options), config=sizes, device_type="cpu", precision="fp32")
    said = []
    content = modes.measure_memory(bench, options, [], said.append, start=start)
    full, stock = content["rows"]
    assert stock["status"] == "left out" and "fake peers" in stock["reason"]
    assert said[0].startswith("full-ep8: peak ")
    # Code that runs for the first time is resident too: some 30 MB.
    above = full["measured"]["peak_bytes"] - full["predicted"]["peak_bytes"]
    assert -5e6 < above < 60e6
