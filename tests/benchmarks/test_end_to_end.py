"""The contenders of the end-to-end benchmark train the same thing, and its summary adds up."""

from pathlib import Path

import pytest

from benchmarks.end_to_end.contenders import Case
from benchmarks.end_to_end.measure import NAMES, build_contenders, check_losses, summarise
from benchmarks.harness.workload import Workload, save_workload

TINY = Workload(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_experts=4,
    vocab_size=64,
    num_examples=64,
    longest_tokens=40,
    global_batch=8,
    per_device_batch=2,
)

NUM_STEPS = 2


def train_all(rank, case, folder):
    return build_contenders(case, TINY, Path(folder), NUM_STEPS).train(NUM_STEPS)


@pytest.mark.parametrize("use_lora", ["none", "attn-only"])
def test_contenders_compute_the_same_losses(ranks2, tmp_path, use_lora):
    save_workload(TINY, tmp_path)
    case = Case(2, 2, use_lora=use_lora, gradient_checkpointing="True")
    first, second = ranks2.run(train_all, case, str(tmp_path))
    assert first == second
    assert tuple(first) == NAMES
    for name in NAMES[1:]:
        assert first[name] == pytest.approx(first["ours"], rel=1e-5)
    assert len(set(first["ours"])) == NUM_STEPS


def test_check_losses_names_what_differs():
    losses = {"ours": [4.0, 3.9], "stock, packed": [4.0, 3.9], "stock, padded": [4.0, 3.91]}
    with pytest.raises(RuntimeError) as caught:
        check_losses(losses)
    assert str(caught.value) == ("the losses differ: ours [4.0, 3.9], stock, padded [4.0, 3.91]")


def test_summary_compares_blocks_of_the_same_round():
    times = {"ours": [1.0, 2.0, 2.0], "stock, packed": [2.0, 2.0, 5.0], "stock, padded": [3.0] * 3}
    summary = summarise({"tokens": [10, 20, 20], "wall_s": times, "cpu_s": times})
    assert summary["tokens_per_s"]["ours"] == {"n": 3, "median": 10.0, "min": 10.0, "max": 10.0}
    packed = {"n": 3, "median": 2.0, "min": 1.0, "max": 2.5}
    assert summary["ratio"]["stock, packed"] == packed
    assert summary["ratio_of_cpu_time"]["stock, packed"] == packed
    assert summary["ratio"]["stock, padded"]["median"] == 1.5
