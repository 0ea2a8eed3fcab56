"""The search takes the tiles that a timer says are fast; the timer is a planted one."""

import math
from dataclasses import replace

import pytest
import torch

from megablocks_utils.kernels.fused.tile import KINDS
from megablocks_utils.kernels.fused.tiles import choose_tiles, list_candidates
from megablocks_utils.kernels.shapes import EXPERT_MODES
from megablocks_utils.kernels.tuning.tile_search import KINDS_OF_MODE, search_tiles, time_on_cuda

START = choose_tiles(arch="sm_90", itemsize=2, rows=2**16, num_experts=8)
CANDIDATES = {kind: list_candidates(kind, arch="sm_90", itemsize=2) for kind in KINDS}


class PlantedTimes:
    """A clock by which each tile of each kind has a time of its own, and the layer their sum."""

    def __init__(self, tile_ms):
        self.tile_ms, self.ran = tile_ms, []

    def time_ms(self, run):
        run()
        return self.layer_ms(self.ran[-1])

    def layer_ms(self, table):
        return sum(self.tile_ms.get((kind, getattr(table, kind)), 10.0) for kind in KINDS)

    def search(self, **options):
        return search_tiles(
            self.ran.append, start=START, candidates=CANDIDATES, time_ms=self.time_ms, **options
        )


def test_the_fastest_tile_of_each_kind_is_found():
    fastest = {kind: tiles[(i + 2) % 3] for i, (kind, tiles) in enumerate(CANDIDATES.items())}
    planted = PlantedTimes(dict.fromkeys(fastest.items(), 5.0))
    result = planted.search()
    assert {kind: getattr(result.tiles, kind) for kind in KINDS} == fastest
    assert (result.start_ms, planted.layer_ms(result.tiles)) == (planted.layer_ms(START), 25.0)


def test_each_candidate_is_measured_once_with_the_others_as_they_stand():
    planted, told = PlantedTimes({("up", CANDIDATES["up"][0]): 1.0}), []
    result = planted.search(on_trial=told.append)
    assert tuple(told) == result.trials
    others = [(kind, tile) for kind in KINDS for tile in CANDIDATES[kind]]
    others = [(kind, tile) for kind, tile in others if tile != getattr(START, kind)]
    assert [(trial.kind, trial.tile) for trial in result.trials] == others
    best = replace(START, up=CANDIDATES["up"][0])
    assert planted.ran[0] == START and planted.ran[1] == best
    assert planted.ran[4] == replace(best, linear=others[3][1])
    assert [trial.is_taken for trial in result.trials] == [True] + [False] * (len(others) - 1)


def test_a_planted_slow_tile_is_not_taken():
    slow = {(kind, tile): 90.0 for kind in KINDS for tile in CANDIDATES[kind]}
    slow |= {(kind, getattr(START, kind)): 10.0 for kind in KINDS}
    assert PlantedTimes(slow).search().tiles == START


@pytest.mark.parametrize(("gain", "is_taken"), [(0.004, False), (0.03, True)])
def test_what_may_be_noise_changes_nothing(gain, is_taken):
    """Of the layer's 50 ms: below a hundredth the table's own tile stays."""
    other = CANDIDATES["linear"][0]
    planted = PlantedTimes({("linear", other): 10.0 - 50 * gain})
    assert planted.search().tiles == (replace(START, linear=other) if is_taken else START)


def test_tiles_that_do_not_fit_in_memory_are_left():
    found = PlantedTimes({("up", START.up): math.inf, ("up", CANDIDATES["up"][0]): 9.0}).search()
    assert math.isinf(found.start_ms) and found.tiles.up == CANDIDATES["up"][0]


def test_every_mode_says_which_kernels_it_runs():
    assert tuple(KINDS_OF_MODE) == EXPERT_MODES
    assert all(set(kinds) <= set(KINDS) for kinds in KINDS_OF_MODE.values())
    assert set(KINDS_OF_MODE["lora"]) == set(KINDS)


class _Event:
    """Stand in for CUDA's: the clock is the number of runs, each as long as its number."""

    def __init__(self, runs):
        self.runs, self.before = runs, None

    def record(self):
        self.before = sum(self.runs)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.before - self.before


@pytest.fixture
def runs(monkeypatch):
    pytest.importorskip("triton")
    runs, make = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **kind: make(1, **kind))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(runs))
    return runs


def test_the_clock_takes_the_median_after_a_warm_up(runs):
    times_ms = [900, 800, 700, *range(1, 16)]
    assert time_on_cuda(lambda: runs.append(times_ms[len(runs)])) == 8
    assert len(runs) == len(times_ms)


def test_the_clock_knows_memory_that_does_not_suffice(runs):
    from triton.runtime.errors import OutOfResources

    def fail(error):
        raise error

    assert time_on_cuda(lambda: fail(torch.OutOfMemoryError())) == math.inf
    assert time_on_cuda(lambda: fail(OutOfResources(2, 1, "shared memory"))) == math.inf
    with pytest.raises(RuntimeError, match="^another$"):
        time_on_cuda(lambda: fail(RuntimeError("another")))
