"""Two equations, the file, and when they say nothing."""

import json
from dataclasses import replace

import pytest

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.speed.calibration import (
    Calibration,
    TimedRun,
    build_record,
    describe_workload,
    read_calibration,
    solve,
)
from tests.planning.cases import PUBLISHED, build_scenario


def timed(name, sent_bytes, *seconds):
    return TimedRun(name, sent_bytes, seconds)


def test_the_equations_give_back_what_made_the_times():
    bytes_per_s, overhead_s = 1.3e11, 0.52
    sent = (245e9, 9e9)  # with and without gathering a Mixtral's experts in every micro-step
    runs = [timed(str(c), c, *([overhead_s + c / bytes_per_s] * 3)) for c in sent]
    found = solve(*runs, {"world_size": 8})
    assert (found.bytes_per_s, found.overhead_s) == pytest.approx((bytes_per_s, overhead_s))
    assert found == solve(*reversed(runs), {"world_size": 8})
    # 16 micro-steps of the first run, and of one between both
    assert found.step_s(16 * 245e9, 16) == pytest.approx(16 * runs[0].median_s)
    assert found.step_s(16 * 100e9, 16) == pytest.approx(16 * (0.52 + 100 / 130))


def test_a_slow_step_does_not_count():
    assert timed("a", 1, 2.0, 2.1, 1.9, 2.0, 99.0).median_s == 2.0
    assert timed("a", 1, 2.0, 2.1, 1.9, 2.0, 99.0).spread_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        # 0.15 s apart, but steps vary by 0.1 s in both
        (timed("a", 9, 2.0, 2.1, 1.9), timed("b", 5, 1.85, 1.75, 1.95), "no difference beside"),
        (timed("a", 9, 2.0), timed("b", 9, 1.0), "both send the same"),
        (timed("a", 9, 1.0), timed("b", 5, 2.0), "the run that sends more was the faster one"),
        # 4 bytes take 1 s, so 9 bytes take 2.25 s of 2
        (timed("a", 9, 2.0), timed("b", 5, 1.0), "nothing is left for anything but sending"),
    ],
)
def test_runs_that_tell_nothing(first, second, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        solve(first, second, {})
    assert f"a took {first.median_s:.3g} s a micro-step, b {second.median_s:.3g} s" in str(
        caught.value
    )


def test_the_file_comes_back(tmp_path):
    runs = [timed("a", 9.0, 2.0, 2.0), timed("b", 5.0, 1.5, 1.5)]
    calibration = solve(*runs, describe_workload(build_scenario()))
    record = build_record(calibration, runs, {"date": "today"})
    path = tmp_path / "node.json"
    path.write_text(json.dumps(record))
    assert read_calibration(path) == calibration
    assert record["runs"][0] == {
        "name": "a",
        "sent_bytes": 9.0,
        "micro_step_s": (2.0, 2.0),
        "median_s": 2.0,
        "spread_s": 0.0,
    }
    assert record["provenance"] == {"date": "today"}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"kind": "else"}', '{"bytes_per_s": 1, "overhead_s": 1, "workload": {}}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "node.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="but it holds something else"):
        read_calibration(path)
    with pytest.raises(ConfigurationError, match="No such file"):
        read_calibration(tmp_path / "none.json")


@pytest.mark.parametrize("number", ["NaN", "0", "-1.0", "Infinity"])
def test_numbers_that_mean_nothing_are_refused(tmp_path, number):
    path = tmp_path / "node.json"
    kind = '"kind": "megablocks_utils calibration"'
    path.write_text(f'{{{kind}, "bytes_per_s": {number}, "overhead_s": 1, "workload": {{}}}}')
    with pytest.raises(ConfigurationError, match="but it holds something else"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("--max_seq_length 512", "max_seq_length"),
        ("--per_device_train_batch_size 2", "per_device_train_batch_size"),
        ("--use_lora attn-only", "use_lora"),
        ("--gradient_checkpointing False", "gradient_checkpointing"),
        ("--precision fp32", "compute_dtype"),
    ],
)
def test_seconds_are_for_the_measured_workload_only(change, word):
    measured = build_scenario()
    calibration = Calibration(1.0, 1.0, describe_workload(measured))
    calibration.check_workload(measured, "node.json")
    # Neither the accumulation nor the layout changes what a micro-step is.
    other = build_scenario(f"{PUBLISHED} --gradient_accumulation_steps 4")
    calibration.check_workload(other, "node.json")
    with pytest.raises(ConfigurationError, match=rf"node\.json, but it was measured with {word} "):
        calibration.check_workload(build_scenario(f"{PUBLISHED} {change}"), "node.json")
    adapters = "--use_lora all --expert_quantization"
    packed = Calibration(1.0, 1.0, describe_workload(build_scenario(f"{adapters} nf4")))
    with pytest.raises(ConfigurationError, match="with expert_quantization nf4 and this plan has "):
        packed.check_workload(build_scenario(f"{adapters} int8"), "node.json")
    with pytest.raises(ConfigurationError, match="with world_size 8 and this plan has 16"):
        calibration.check_workload(replace(measured, world_size=16), "node.json")
    with pytest.raises(ConfigurationError, match="with model_type mixtral and this plan has qwen3"):
        calibration.check_workload(build_scenario(model="qwen3-30b-a3b"), "node.json")
