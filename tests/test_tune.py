"""The command measures what a run would look up, and says what is wrong in one sentence."""

import math
import re
from dataclasses import replace

import pytest
import torch

from megablocks_utils import tune
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.fused.tile import KINDS
from megablocks_utils.kernels.fused.tiles import choose_tiles, list_candidates
from megablocks_utils.kernels.selection.backend_selection import select_backend
from megablocks_utils.kernels.tuning.measurements import read_entries
from megablocks_utils.kernels.tuning.tile_search import KINDS_OF_MODE
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_spec
from megablocks_utils.moe.expert_use import ExpertUse
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.tune import (
    TuneOptions,
    main,
    parse_options,
    read_shapes,
)
from tests.kernels.facts import H100, V100, put_triton
from tests.support.tiny_models import build_tiny_model


def test_options():
    assert parse_options(["--model_name_or_path", "m", "--tokens=16384"]) == TuneOptions("m", 16384)
    line = "--model_name_or_path m --tokens 9 --ep_size 4 --use_lora all --lora_r 8 --dtype float32"
    assert parse_options(line.split()) == TuneOptions("m", 9, 4, "all", 8, "float32")
    with pytest.raises(HelpRequested) as caught:
        parse_options(["-h"])
    text = str(caught.value)
    assert "rank of adapters on the experts.\n      Default: 16." in text.replace("Rank", "rank")
    assert max(map(len, text.splitlines())) <= 100


REFUSALS = {
    "": "--model_name_or_path is not given, but it must be a name or path.",
    "--model_name_or_path m": "--tokens is not given, but it must be a whole number of at least 1.",
    "--tokens": "--tokens has no value, but it must be a whole number of at least 1.",
    "--tokens many --model_name_or_path m": "--tokens is many, but it must be a whole number of at "
    "least 1.",
    "--tokens 1 --model_name_or_path m --use_lora some": "--use_lora is some, but it must be none, "
    "attn-only, mlp-only or all.",
    "--tokens 1 --model_name_or_path m --expert_quantization nf4": "--expert_quantization is nf4, "
    "but --use_lora is none, which trains the experts, and packed weights are frozen: --use_lora "
    "must be attn-only, mlp-only or all, or --expert_quantization none.",
    "--token 1": "unknown option --token; did you mean --tokens?",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals(line):
    with pytest.raises(ConfigurationError) as caught:
        parse_options(line.split())
    assert str(caught.value) == REFUSALS[line]


def test_without_a_gpu_the_command_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run_entry_point(main, ["--model_name_or_path", "none", "--tokens", "4"])
    assert ended.value.code == 2
    sentence = "tune measures on a CUDA GPU, but torch finds none here.\n"
    assert capsys.readouterr() == ("", sentence)


@pytest.fixture
def folder(tmp_path):
    """A model folder with nothing but its configuration."""
    build_tiny_model("mixtral").config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("use_lora", ["none", "attn-only", "mlp-only"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_what_is_measured_is_what_a_run_looks_up(folder, use_lora, ep_size):
    options = TuneOptions(str(folder), 33, ep_size=ep_size, use_lora=use_lora)
    model = build_tiny_model("mixtral")
    module = next(iter(find_expert_modules(model).values()))
    mode = {"none": "full", "attn-only": "frozen", "mlp-only": "lora"}[use_lora]
    use = ExpertUse("cuda", torch.bfloat16, mode, 33)
    spec = read_expert_spec(module)
    assert read_shapes(options) == use.shapes(spec, torch.bfloat16, 2, ep_size)


def test_models_that_cannot_be_measured(folder, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        read_shapes(TuneOptions(str(folder), 33, ep_size=3))
    assert str(caught.value) == (
        "ep_size is 3, but it must divide the 4 experts of this model; 1, 2 and 4 would work."
    )
    with pytest.raises(CheckpointError, match="does not exist"):
        read_shapes(TuneOptions(str(tmp_path / "none"), 33))


class PlantedTimes:
    """Run the layer once, and say that half-high tiles of one kind are twice as fast."""

    def __init__(self, monkeypatch, *, kind="linear", grouped_mm_ms=9.0):
        self.kind, self.tiles = kind, []
        self.others_ms = iter((30.0, grouped_mm_ms))  # eager is measured first
        put_triton(monkeypatch, self.run_experts)

    def run_experts(self, *inputs, tiles):
        self.tiles.append(tiles)
        return run_experts_eager(*inputs)

    def time_ms(self, run):
        before = len(self.tiles)
        output, *gradients = run()
        assert output.isfinite().all() and all(grad.isfinite().all() for grad in gradients)
        if len(self.tiles) == before:
            return next(self.others_ms)
        return 4.0 if getattr(self.tiles[-1], self.kind).block_m == 128 else 8.0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine's file of measurements that does not exist yet."""
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels.json"


@pytest.mark.parametrize("use_lora", ["none", "attn-only", "all"])
def test_what_is_found_is_kept_and_taken_by_auto(folder, cache, monkeypatch, capsys, use_lora):
    planted = PlantedTimes(monkeypatch)
    options = TuneOptions(str(folder), 33, use_lora=use_lora, lora_r=4)
    tune.tune(options, H100, "cpu", planted.time_ms)
    shapes = read_shapes(options)
    selection = select_backend("auto", shapes, H100)
    sizes = {"arch": "sm_90", "itemsize": 2}
    start = choose_tiles(rows=66, num_experts=4, **sizes)
    fast = next(t for t in list_candidates("linear", **sizes) if t.block_m == 128)
    assert selection.name == "triton"
    assert selection.tiles == replace(start, linear=fast) != start
    (entry,) = read_entries(cache)
    assert entry.times_ms == {"eager": 30.0, "grouped_mm": 9.0, "triton": 4.0}
    assert entry.lora_r == (4 if use_lora == "all" else None)
    kinds = KINDS_OF_MODE[shapes.mode]
    trials = {kind: len(list_candidates(kind, **sizes)) - 1 for kind in kinds}
    assert len(planted.tiles) == 1 + sum(trials.values()) + 1
    shown = capsys.readouterr().out
    assert all(shown.count(f"│ {kind} ") == trials.get(kind, 0) for kind in KINDS)
    assert shown.endswith(f"auto takes triton for this; written to {cache}\n")


def test_a_triton_that_loses_is_not_taken(folder, cache, monkeypatch, capsys):
    planted = PlantedTimes(monkeypatch, grouped_mm_ms=3.0)
    options = TuneOptions(str(folder), 33)
    tune.tune(options, H100, "cpu", planted.time_ms)
    assert select_backend("auto", read_shapes(options), H100).name == "grouped_mm"
    assert "auto takes grouped_mm for this" in capsys.readouterr().out


def test_the_table(folder, cache, monkeypatch, capsys):
    options = TuneOptions(str(folder), 33, ep_size=2, use_lora="mlp-only")
    planted = PlantedTimes(monkeypatch, grouped_mm_ms=math.inf)
    monkeypatch.setenv("COLUMNS", "100")
    tune.tune(options, H100, "cpu", planted.time_ms)
    lines = capsys.readouterr().out.splitlines()
    title = " ".join(lines[: next(i for i, line in enumerate(lines) if "━" in line)])
    assert " ".join(title.split()) == (
        f"{folder} on NVIDIA H100 80GB HBM3: 2 experts of 64 x 96, 64 rows, bfloat16, lora (rank "
        "16), silu"
    )
    rows = [re.findall(r"[^│\s](?:[^│]*[^│\s])?", line) for line in lines if "│" in line]
    assert ["linear", "128 x 256 x 64", "8", "3", "4.00", "taken"] in rows
    assert ["up", "128 x 128 x 64", "8", "4", "8.00"] in rows
    assert ["up", "128 x 128 x 64, persistent", "8", "4", "8.00"] in rows
    assert rows[0] == ["all", "as the package has them", "8.00"]
    assert rows[-3:] == [
        ["eager", "30.00"],
        ["grouped_mm", "out of memory"],
        ["triton", "4.00", "fastest"],
    ]


def test_what_cannot_be_measured_is_said_before_any_work(folder, cache, monkeypatch):
    planted = PlantedTimes(monkeypatch)

    def refusal(facts=H100, **options):
        with pytest.raises(ConfigurationError) as caught:
            options = TuneOptions(str(folder), 33, **options)
            tune.tune(options, facts, "cpu", planted.time_ms)
        assert planted.tiles == []
        return str(caught.value)

    assert refusal(V100).startswith("only eager can run this layer here: grouped_mm needs ")
    cache.parent.mkdir()
    cache.write_text("damaged")
    assert refusal().startswith(f"{cache} is damaged, or not a file of measurements")
