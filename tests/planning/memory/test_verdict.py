"""What fits, what is tight and what does not, to the byte."""

import pytest

from megablocks_utils.byte_units import GIB
from megablocks_utils.planning.memory.verdict import WORDS, judge
from megablocks_utils.planning.model.gpus import GPUS
from megablocks_utils.planning.model.units import choose_unit, format_count, format_gb
from tests.planning.cases import build_prediction

PEAK = 50_000_000_000
CONTEXT, TENTH = 1_500_000_000, 5_000_000_000


@pytest.mark.parametrize(
    ("capacity", "verdict"),
    [
        (PEAK + CONTEXT + TENTH, "fits"),
        (PEAK + CONTEXT + TENTH - 1, "tight"),
        (PEAK + CONTEXT, "tight"),
        (PEAK + CONTEXT - 1, "oom"),
        (PEAK, "oom"),
    ],
)
def test_a_gpu_keeps_a_tenth_and_the_context_free(capacity, verdict):
    found = judge(build_prediction(optimizer=30 * 10**9, gradients=20 * 10**9), capacity)
    assert (found.name, found.cause) == (verdict, "optimizer states")
    assert found.reserve_bytes == CONTEXT + TENTH
    assert found.headroom_bytes == capacity - PEAK - CONTEXT - TENTH
    assert not found.is_impossible


def test_only_a_peak_above_the_capacity_is_impossible():
    prediction = build_prediction(fsdp_buffers=PEAK)
    assert judge(prediction, PEAK - 1).is_impossible
    assert not judge(prediction, PEAK).is_impossible


def test_a_cpu_needs_no_reserve():
    prediction = build_prediction(activations=PEAK)
    at, below = judge(prediction, PEAK, "cpu"), judge(prediction, PEAK - 1, "cpu")
    assert (at.name, at.reserve_bytes, at.headroom_bytes) == ("fits", 0, 0)
    assert (below.name, below.cause, below.is_impossible) == ("oom", "activations", True)


def test_every_component_has_words():
    for name, words in WORDS.items():
        assert judge(build_prediction(**{name: 1}), 1).cause == words


# What nvidia-smi calls the memory of these cards, MiB. It holds some of it back itself, so torch
# gets a little less: between 0.3 % and 1.6 % on these.
NVIDIA_SMI_MIB = {
    "a100-40g": 40960,
    "a100-80g": 81920,
    "h100-80g": 81559,
    "h200-141g": 143771,
    "b200-180g": 183359,
    "l40s-48g": 46068,
}


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_a_little_less_than_the_tool_shows(name):
    share = GPUS[name].memory_bytes / (NVIDIA_SMI_MIB[name] * 1024**2)
    assert 0.984 < share < 0.997
    assert GPUS[name].name == name


def test_bytes_in_words():
    gb = [0, 999, 1234, 99_940, 150_000, 4_560_000, 940_000_000, 950_000_000, 48_249_999_999]
    assert [format_gb(number) for number in gb] == [
        *("0.0 GB", "999 B", "1.2 kB", "99.9 kB", "150 kB", "4.6 MB", "940 MB", "0.9 GB"),
        "48.2 GB",
    ]
    unit = choose_unit(GIB)
    gib = [0, 1, GIB // 100, GIB // 2, 10 * GIB, -5 * GIB]
    shown = [unit.format_binary(number) for number in gib]
    assert shown == ["0", "~0", "0.01", "0.50", "10.0", "-5.0"]
    assert (unit.binary, unit.decimal, unit.format_decimal(GIB)) == ("GiB", "GB", "1.1")
    small = choose_unit(100 * 2**20)
    assert (small.binary, small.format_binary(100 * 2**20)) == ("MiB", "100.0")
    assert (small.decimal, small.format_decimal(100 * 2**20)) == ("MB", "104.9")
    assert [format_count(46_702_792_704), format_count(19_700_000)] == ["46.7 B", "19.7 M"]
