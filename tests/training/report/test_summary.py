"""What a person reads before and after a run, to the letter."""

import io
from dataclasses import replace
from types import SimpleNamespace

from rich.console import Console

from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.parameters import ParameterCounts
from megablocks_utils.training.report.summary import (
    RunFacts,
    RunResult,
    build_console,
    build_start_summary,
    describe_precision,
    show_end_summary,
    show_start_summary,
)

GIB = 1024**3
FACTS = RunFacts(
    model="[tiny]/mixtral",
    family="mixtral",
    parameters=ParameterCounts(total=46_702_792_704, active=12_879_925_248, trainable=3_407_872),
    precision="fp32: float32 weights",
    dp_size=2,
    ep_size=2,
    num_experts=4,
    top_k=2,
    expert_dp="shard",
    kernel="grouped_mm",
    kernel_reason="the fastest this machine has for shapes that are multiples of 16 bytes",
    dispatch="tokens: a token sends 86 bytes a layer as tokens, 131 as rows",
    expert_bytes=11 * GIB,
    dense_bytes=3 * 1024**2,
    examples_kept=51760,
    examples_cut=12,
    examples_dropped=3,
    plan="peak 47.6 GB in the backward of 80.0 GB: fits",
    steps=1404,
    examples_per_step=32,
)
RESULT = RunResult(
    totals=RunTotals(1404, 300_000, 600_000, 37 * GIB, 20 * GIB),
    first_loss=2.10312,
    final_loss=1.75,
    train_runtime_s=3661.0,
    memory_source="CUDA tensors",
    kernel_check=None,
    adapter_check=None,
    expert_load=None,
    output_dir="./results",
    files=(("metrics.jsonl", "one line a step"), ("loss.png", "the loss curve")),
)


def build_text_console(width=80):
    return Console(file=io.StringIO(), width=width, highlight=False)


def lines_of(console):
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_start_summary_at_80_columns():
    console = build_text_console()
    show_start_summary(console, FACTS)
    assert lines_of(console) == [
        "Training",
        "  model       [tiny]/mixtral (mixtral)",
        "  parameters  46.7 B total, 12.9 B active per token, 3.41 M trainable (0.01%)",
        "  precision   fp32: float32 weights",
        "  experts     4 a layer, each token passes 2",
        "  kernel      grouped_mm: the fastest this machine has for shapes that are",
        "              multiples of 16 bytes",
        "  weights     11.00 GiB of experts and 3.00 MiB of everything else per rank",
        "  plan        peak 47.6 GB in the backward of 80.0 GB: fits",
        "  examples    51,760 kept (12 of them cut), 3 dropped",
        "  steps       1,404, 32 examples each",
        "  mesh        dp 2 x ep 2: every rank holds 1/2 of each of its experts",
        "  dispatch    tokens: a token sends 86 bytes a layer as tokens, 131 as rows",
        "",
        "         ep 0                  ep 1",
        "  ────────────────────────────────────────────────",
        "  dp 0   rank 0: experts 0-1   rank 1: experts 2-3",
        "  dp 1   rank 2: experts 0-1   rank 3: experts 2-3",
        "",
    ]


def test_start_summary_says_what_dp_does():
    def mesh_line(**changes):
        console = build_text_console(120)
        console.print(build_start_summary(replace(FACTS, **changes), 120))
        return next(line for line in lines_of(console) if line.startswith("  mesh"))

    assert mesh_line(expert_dp="replicate") == (
        "  mesh        dp 2 x ep 2: every rank holds its experts whole, 2 copies of each"
    )
    assert mesh_line(dp_size=1, ep_size=4) == (
        "  mesh        dp 1 x ep 4: every rank holds its experts whole"
    )


def test_end_summary_at_80_columns():
    console = build_text_console()
    show_end_summary(console, RESULT)
    assert lines_of(console) == [
        "Finished",
        "  steps        1,404",
        "  loss         2.1031 at the first step, 1.7500 at the last",
        "  runtime      1:01:01, 164 input tokens/s (600,000 in all, loss on 300,000)",
        "  peak memory  37.00 GiB on the fullest rank, CUDA tensors",
        "  output       ./results",
        "               metrics.jsonl  one line a step",
        "               loss.png       the loss curve",
        "",
    ]


def test_end_summary_says_what_checking_the_kernel_found():
    console = build_text_console()
    check = KernelCheck("gradient of down_proj", worst=1.0312, seconds=0.034)
    show_end_summary(console, replace(RESULT, kernel_check=check.describe()))
    assert lines_of(console)[5:8] == [
        "  kernel       compared with eager before the first step (0.03 s): at most 1.03",
        "               times as far off as rounding explains (gradient of down_proj; 2",
        "               is allowed)",
    ]


def test_end_summary_of_an_adapter_says_what_its_check_found():
    console = build_text_console()
    show_end_summary(console, replace(RESULT, adapter_check="8 of 8 expert adapters"))
    assert "  adapter      8 of 8 expert adapters" in lines_of(console)


def test_console_writes_to_standard_error_of_rank_0_only(capsys):
    for is_main in (False, True):
        show_end_summary(build_console(is_main), RESULT)
        streams = capsys.readouterr()
        assert streams.out == ""
        assert ("Finished" in streams.err) == is_main


def test_forced_colours_make_no_live_bars_in_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not build_console(True).is_interactive


def test_precision_in_words():
    fp32 = SimpleNamespace(
        name="fp32",
        weights="float32",
        compute="float32",
        optim="float32",
        adapter="float32",
        stochastic_rounding=False,
    )
    assert describe_precision(fp32) == (
        "fp32: float32 weights, float32 compute, float32 optimizer states"
    )
    bf16_sr = SimpleNamespace(
        name="bf16_sr",
        weights="bfloat16",
        compute="bfloat16",
        optim="bfloat16",
        adapter="float32",
        stochastic_rounding=True,
    )
    assert describe_precision(bf16_sr) == (
        "bf16_sr: bfloat16 weights, float32 adapters, bfloat16 compute, bfloat16 optimizer states, "
        "updates rounded stochastically"
    )


def test_packed_experts_have_a_line():
    console = build_text_console()
    show_start_summary(console, replace(FACTS, packed="in nf4"))
    assert "  packed      in nf4" in lines_of(console)


def test_ignored_keys_are_named_in_one_line():
    console = build_text_console()
    show_start_summary(console, replace(FACTS, ignored_keys=("id", "messages.source")))
    assert "  ignored     id, messages.source: no meaning for training" in lines_of(console)
