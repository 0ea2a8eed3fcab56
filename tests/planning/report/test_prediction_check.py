"""Plan against run: every line, to the letter."""

import io
import json
import os

import pytest
from rich.console import Console

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.report.prediction_check import (
    KEPT_BYTES,
    build_check_table,
    compare,
    read_run_plan,
)

PLAN = {
    "predicted": {
        "components": {
            "parameters": 11_700_000_000,
            "gradients": 11_700_000_000,
            "optimizer": 23_400_000_000,
            "fsdp_buffers": 1_000_000_000,
            "activations": 300_000_000,
            "dispatch_buffers": 0,
        },
        "peak_bytes": 48_100_000_000,
        "allocated_bytes": 35_100_000_000,
        "moment": "backward",
    },
    "measured": {
        "components": {"parameters": 11_700_000_000, "optimizer": 23_000_000_000},
        "peak_bytes": 50_000_000_000,
        "allocated_bytes": 35_000_000_000,
    },
    "capacity_bytes": 85_000_000_000,
    "verdict": "fits",
}


def write(tmp_path, record):
    path = tmp_path / "run.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def test_errors_are_signed_and_relative_to_what_was_measured():
    errors = {row.name: row.error_percent for row in compare(PLAN)}
    assert errors["parameters"] == 0
    assert errors["optimizer states"] == pytest.approx(100 * 0.4 / 23)
    assert errors["peak"] == pytest.approx(-3.8)  # 1.9 of 50 GB too low
    assert errors["allocated between steps"] == pytest.approx(100 * 0.1 / 35)
    assert errors["gradients"] is errors["activations"] is None


def test_the_table(tmp_path):
    plan = read_run_plan(write(tmp_path, {"plan": PLAN, "status": "finished"}))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(build_check_table(plan))
    lines = [line.split("  ") for line in console.export_text().splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows[0] == ["Plan against the run, on the fullest rank"]
    assert ["predicted", "measured", "error"] in rows
    assert ["parameters", "11.7 GB", "11.7 GB", "+0.0 %"] in rows
    assert ["optimizer states", "23.4 GB", "23.0 GB", "+1.7 %"] in rows
    assert ["gradients", "11.7 GB", "-", "-"] in rows
    assert ["peak", "48.1 GB", "50.0 GB", "-3.8 %"] in rows
    assert ["allocated between steps", "35.1 GB", "35.0 GB", "+0.3 %"] in rows


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "but that is no valid JSON"),
        ("[" * 100_000, "but that is no valid JSON"),
        ({}, "but it holds no plan"),
        ([], "but it holds no plan"),
        ({"plan": None}, "but it holds no plan"),
        ({"plan": {"predicted": {}}}, "but it holds no plan"),
        ({"plan": {"predicted": {"components": []}, "measured": {}}}, "but it holds no plan"),
    ],
)
def test_files_without_a_plan(tmp_path, record, words):
    wanted = r"; it must be the run\.json of a finished run that was planned\.$"
    with pytest.raises(ConfigurationError, match=words + wanted):
        read_run_plan(write(tmp_path, record))


def test_a_run_that_was_not_planned_says_why(tmp_path):
    path = write(tmp_path, {"plan": {"not_planned": "its family is new.", "measured": {}}})
    with pytest.raises(ConfigurationError, match=r"that run was not planned: its family is new\.$"):
        read_run_plan(path)


def test_what_the_c_library_keeps_is_told_apart():
    plan = PLAN | {"measured": PLAN["measured"] | {KEPT_BYTES: 1_900_000_000}}
    rows = {row.name: row for row in compare(plan)}
    assert rows["kept by the C library"].measured == 1_900_000_000
    assert rows["peak"].error_percent == pytest.approx(-3.8)
    assert rows["peak without it"].error_percent == 0


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ConfigurationError, match="that is no file; it must be"):
            read_run_plan(path)
    with pytest.raises(ConfigurationError, match=r"cannot be read \(No such file or directory\)"):
        read_run_plan(tmp_path / "none.json")


def test_what_is_no_number_counts_as_missing():
    plan = {"predicted": {"peak_bytes": "much"}, "measured": {"peak_bytes": True}}
    row = next(row for row in compare(plan) if row.name == "peak")
    assert (row.predicted, row.measured, row.error_percent) == (None, None, None)
