"""The benchmark table: its rows, how its runs end, and what they leave."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train_accelerate_fsdp2
from benchmarks.harness.launchers import ForkedRanks, Job, Torchrun
from benchmarks.harness.outcome import Ending, explain
from benchmarks.harness.processes import as_words
from benchmarks.harness.workload import build_config, save_equal_examples, save_model
from benchmarks.table import __main__ as table
from benchmarks.table import bench as bench_module
from benchmarks.table import modes
from benchmarks.table.bench import CPU_SIZES, build_bench, read_published_model
from benchmarks.table.options import parse_options
from benchmarks.table.rows import ROWS
from benchmarks.table.runs import find_unsupported_reason, read_run, take_rounds
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.planning.model.model_shape import ModelShape
from tests.benchmarks.table_programs import OOM as OOM_MESSAGE
from tests.support.rank_pool import start_forkserver

ROOT = Path(__file__).parents[2]
TINY_SIZES = CPU_SIZES | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
TINY = {**read_published_model(), **TINY_SIZES}
BY_NAME = {row.name: row for row in ROWS}
PROGRAM = ("-m", "tests.benchmarks.table_programs")


# --- rows ------------------------------------------------------------------------------------


def test_published_figures_are_those_of_the_published_table():
    """As its README has them: type, ep_size, kernel of the experts; seconds, peak, allocated."""
    expected = {
        ("none", None, None): (3037, 59, 47),
        ("none", 8, "megablocks"): (871, 49, 36),
        ("none", 4, "megablocks"): (None, None, None),  # out of memory
        ("attn-only", None, None): (2137, 22, 12),
        ("attn-only", 8, "megablocks"): (878, 14, 12),
        ("attn-only", 4, "megablocks"): (878, 26, 25),
        ("attn-only", 4, "scattermoe"): (831, 25, 24),
        ("all", 4, "scattermoe"): (880, 26, 25),
    }
    found = {}
    for row in ROWS:
        if row.published is not None:
            # The package has no adapters on experts: there, ours runs in its place.
            kernel = "scattermoe" if row.use_lora == "all" else row.kernel
            key = (row.use_lora, row.ep_size(8), kernel) if row.ep_share else None
            one = row.published
            found[key or (row.use_lora, None, None)] = (
                one.runtime_s,
                one.peak_bytes and one.peak_bytes / 1e9,
                one.allocated_bytes and one.allocated_bytes / 1e9,
            )
    assert found == expected
    # 100 steps of 16 micro-steps: 3037 s are 1.90 s a micro-step, 871 s are 0.54 s.
    seconds = [BY_NAME[name].published.micro_step_s for name in ("full-none", "full-ep8")]
    assert seconds == pytest.approx([1.898, 0.544], abs=1e-3)


def test_the_published_model_is_mixtral_8x7b():
    """46.70 B parameters, 45.10 B of them in experts."""
    shape = ModelShape.from_config(read_published_model())
    assert (shape.num_parameters, shape.num_expert_parameters) == (46_702_792_704, 45_097_156_608)


def test_copies_are_asked_for_where_the_seed_kept_them_and_sharding_elsewhere():
    bench = build_bench(parse_options(["--plan"]))
    words = {row.name: " ".join(as_words(bench.arguments(row))) for row in ROWS}
    assert "--ep_size 4 --expert_dp replicate --kernel megablocks" in words["full-ep4"]
    assert "--ep_size 4 --expert_dp shard --kernel triton" in words["full-ep4-shard"]
    assert "--use_megablocks_sharding" not in words["attn-none"]
    common = "--precision bf16 --use_lora all --lora_r 16 --max_seq_length 256 "
    common += "--per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_steps 30 "
    assert words["all-ep4"].startswith(common)
    assert "--kernel" not in words["stock-full-ep8"]  # transformers' own


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "no mode given, but it must be exactly one of --plan, --one_gpu, --cpu or --real."),
        (
            "--cpu --plan",
            "--cpu and --plan given, but it must be exactly one of --plan, --one_gpu, --cpu or "
            "--real.",
        ),
        ("--plan --rows full-ep5", "--rows names full-ep5, but no row; did you mean full-ep8?"),
        ("--plan --steps 3", "--steps is 3, but --plan does not take it."),
        ("--cpu --steps 0", "--steps is 0, but it must be a whole number of at least 1."),
        (
            "--cpu --ranks 6",
            "--ranks is 6, but it must be 2, 4 or 8: the experts are split over all ranks and over "
            "half of them, and there are 8.",
        ),
        ("--plan --output a.txt", "--output is a.txt, but it must end in .json."),
        ("--plan --rounds", "--rounds has no value, but it must be a whole number of at least 1."),
        ("--plan --outptu x", "unknown option --outptu; did you mean --output?"),
    ],
)
def test_bad_options_are_one_sentence(words, sentence):
    with pytest.raises(ConfigurationError) as caught:
        parse_options(words.split())
    assert str(caught.value) == sentence


def test_help_and_bad_options_need_no_torch():
    code = (
        "import sys\nfrom benchmarks.table import __main__ as table\n"
        "from megablocks_utils.config.reader import HelpRequested\n"
        "from megablocks_utils.errors import UserError\nfor words in (['--help'], ['--no']):\n"
        "    try:\n        table.main(words)\n    except (HelpRequested, UserError):\n"
        "        print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout.split() == ["False", "False"], answer.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--one_gpu",
            "--one_gpu needs a CUDA GPU, but torch finds none here; --plan predicts the memory.",
        ),
        (
            "--real",
            "--ranks is 8, but torch finds 0 GPUs here; --one_gpu measures memory on one, --cpu "
            "runs a small model without, --plan predicts.",
        ),
    ],
)
def test_a_machine_without_gpus_is_refused_and_nothing_is_written(
    tmp_path, monkeypatch, words, sentence
):
    monkeypatch.setattr(modes.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(modes.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigurationError) as caught:
        table.main([words, "--output", str(tmp_path / "table.json")])
    assert str(caught.value) == sentence
    assert list(tmp_path.iterdir()) == []


# --- how runs end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "status", "exit_code", "reason"),
    [
        ("oom", "OOM", 1, f"OutOfMemoryError: {OOM_MESSAGE}"),
        ("killed", "OOM", -9, "killed by the system (SIGKILL)"),
        ("refused", "failed", 2, "--kernel is scattermoe, but it runs experts without adapters."),
        ("wrong", "failed", 1, "ValueError: told to end wrong"),
        ("late", "failed", -1, "it did not end within 1 s"),
    ],
)
def test_a_run_that_ends_badly_is_a_row_that_says_why(tmp_path, way, status, exit_code, reason):
    start_forkserver()
    timeout_s = 1 if way == "late" else 60
    ending = ForkedRanks()(Job(PROGRAM, {"end": way}, 2, tmp_path, timeout_s))
    outcome = explain(ending)
    assert (outcome["status"], outcome["exit_code"]) == (status, exit_code)
    assert reason in outcome["reason"]


def test_torchrun_reports_the_rank_that_failed_first(tmp_path):
    """Rank 0 only waits; the last line of rank 1 and its exit code are what counts."""
    outcome = explain(Torchrun()(Job(PROGRAM, {"end": "oom"}, 2, tmp_path, 60)))
    assert (outcome["status"], outcome["exit_code"]) == ("OOM", 1)
    assert outcome["reason"].endswith(f"OutOfMemoryError: {OOM_MESSAGE}")


def test_a_run_without_a_message_still_has_its_exit_code():
    assert explain(Ending(7)) == {"status": "failed", "reason": "no message", "exit_code": 7}


@pytest.mark.parametrize("kernel", ["megablocks", "scattermoe"])
def test_a_missing_package_is_a_row_with_the_line_that_installs_it(monkeypatch, kernel):
    bench = build_bench(parse_options(["--plan"]))
    row = BY_NAME["attn-ep4" if kernel == "megablocks" else "attn-ep4-scattermoe"]
    monkeypatch.setattr(Backend, "is_installed", lambda backend: backend.name != kernel)
    unsupported_reason = find_unsupported_reason(row, bench)
    assert unsupported_reason["status"] == "not installed"
    assert unsupported_reason["reason"].startswith(f"{kernel} is not installed; install it with: ")
    monkeypatch.setattr(Backend, "is_installed", lambda backend: True)
    assert find_unsupported_reason(row, bench) is None


def test_on_a_cpu_rows_of_gpu_packages_run_with_grouped_mm_or_say_which_row_they_are():
    bench = build_bench(parse_options(["--cpu"]))
    reasons, tried = {}, []
    for row in ROWS:
        unsupported_reason = find_unsupported_reason(row, bench, tried)
        reasons[row.name] = unsupported_reason and unsupported_reason["reason"]
        tried += [] if unsupported_reason else [row]
    is_triton = "triton needs a GPU (its interpreter is no timing); with grouped_mm this is"
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "attn-ep4-scattermoe": "scattermoe needs a GPU; with grouped_mm this is attn-ep4",
        "full-ep8-triton": f"{is_triton} full-ep8",
        "attn-ep8-triton": f"{is_triton} attn-ep8",
    }
    assert bench.arguments(BY_NAME["full-ep8"])["kernel"] == "grouped_mm"


def test_rounds_alternate_and_a_row_that_cannot_be_measured_is_not_tried_again():
    calls = []

    def run(row):
        calls.append(row.name)
        return {"status": "OOM" if row.name == "full-ep4" else "measured"}

    rows = [BY_NAME[name] for name in ("full-none", "full-ep4", "full-ep8")]
    take_rounds(rows, 3, run)
    assert calls == [
        *("full-none", "full-ep4", "full-ep8"),
        *("full-ep8", "full-none"),
        *("full-none", "full-ep8"),
    ]


# --- real runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny model and 16 examples of 24 tokens."""
    folder = tmp_path_factory.mktemp("table")
    save_model(build_config(TINY), folder / "model")
    save_equal_examples(folder / "data.jsonl", vocab_size=128, tokens=24, count=16)
    return folder


def _train(rank, argv):
    train_accelerate_fsdp2.main(argv)


def test_numbers_of_a_run_are_those_that_it_wrote(ranks2, tiny_folder, tmp_path):
    bench = build_bench(parse_options(["--cpu", "--ranks", "2", "--steps", "2"]))
    bench = replace(bench, config=TINY, tokens=24)
    options = bench.arguments(BY_NAME["full-ep8"]) | {
        "model_name_or_path": tiny_folder / "model",
        "data_path": tiny_folder / "data.jsonl",
        "output_dir": tmp_path,
    }
    ranks2.run(_train, as_words(options))
    found = read_run(tmp_path, warmup_steps=1, accumulation=2, ranks=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert found["micro_step_s"] == [line["step_time_s"] / 2 for line in lines[1:]]
    # 2 ranks x 2 micro-steps of one example of 24 tokens.
    rates = [96 / line["step_time_s"] for line in lines[1:]]
    assert found["tokens_per_s"] == pytest.approx(rates)
    assert found["tokens_per_rank"] == 24
    assert found["peak_bytes"] == max(line["mem_peak_bytes"] for line in lines)
    assert found["first_loss"] == lines[0]["loss"]
    assert found["mesh"] == {"dp": 1, "ep": 2} and found["kernel"] == "grouped_mm"


def test_cpu_table_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    start_forkserver()
    monkeypatch.setattr(bench_module, "CPU_SIZES", TINY_SIZES)
    rows = "attn-ep8,attn-ep4,attn-ep8-triton,stock-attn-ep8"
    path = tmp_path / "table.json"
    words = ["--cpu", "--ranks", "2", "--rounds", "1", "--rows", rows, "--output", str(path)]
    table.main(words)
    content = json.loads(path.read_text())
    assert {"command", "commit", "versions", "hardware", "date", "method"} <= content.keys()
    ours, half, copy, stock = content["rows"]
    assert [row["status"] for row in content["rows"]] == [
        *("measured", "left out", "left out", "measured")
    ]
    assert half["reason"] == "ep would be 1: this layout needs more ranks"
    assert copy["title"] == "LoRA r16 attn-only, ep 2, triton"  # what it would have been
    assert stock["measured"]["kernel"] == "transformers"
    assert ours["measured"]["first_loss"] == pytest.approx(stock["measured"]["first_loss"], 1e-6)
    ratio = ours["ratios"]["transformers"]["measured"]
    times = [row["runs"][0]["micro_step_s"][0] for row in (ours, stock)]
    assert (ratio["n"], ratio["median"]) == (1, times[1] / times[0])
    assert ours["measured"]["base_peak_bytes"] > 100e6  # Python and torch
    assert abs(ours["measured"]["peak_bytes"] - ours["measured"]["base_peak_bytes"]) < 50e6
    text = capsys.readouterr().out
    assert path.with_suffix(".md").read_text() in text
    assert f"{ours['measured']['micro_step_s']['median']:.3f}" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
