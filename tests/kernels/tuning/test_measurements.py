"""Measurements on disk: found for exactly what was measured, never lost, never half written."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.gate import Clamp, KnownGate
from megablocks_utils.kernels.tuning.measurements import (
    SHIPPED_PATH,
    Measurements,
    build_key,
    cache_path,
    read_entries,
    read_measurements,
    store_entry,
)
from tests.kernels.facts import H100
from tests.kernels.measured import SHAPES, measured

KEY = build_key(SHAPES, H100)


def test_round_trip(tmp_path):
    path = tmp_path / "cache" / "kernels.json"
    entry = measured({"triton": 12.0, "grouped_mm": None, "eager": 30})
    store_entry(entry, path)
    assert read_entries(path) == [entry]
    other = measured(shapes=replace(SHAPES, mode="full"), lora_r=None, tiles=None)
    store_entry(other, path)
    newer = replace(entry, times_ms={"triton": 11.0})
    store_entry(newer, path)
    assert read_entries(path) == [other, newer]
    assert {file.name for file in path.parent.iterdir()} == {"kernels.json", "kernels.json.lock"}


def test_what_is_in_a_key():
    assert KEY.rows == 32768 and KEY.mode == "lora" and KEY.dtype == "bfloat16"
    for name in ("num_local_experts", "top_k", "num_rows"):
        assert build_key(replace(SHAPES, **{name: None}), H100) is None


OTHERS = {
    "another GPU": (SHAPES, replace(H100, name="NVIDIA H200")),
    "another torch": (SHAPES, replace(H100, torch_version="2.14.0")),
    "another triton": (SHAPES, replace(H100, triton_version="3.10.0")),
    "fewer rows": (replace(SHAPES, num_rows=32767), H100),
    "twice the rows": (replace(SHAPES, num_rows=65536), H100),
    **{
        name: (replace(SHAPES, **{name: value}), H100)
        for name, value in {
            "hidden_size": 2048,
            "intermediate_size": 768,
            "num_local_experts": 4,
            "top_k": 1,
            "dtype": torch.float32,
            "mode": "frozen",
            "gate": KnownGate(clamp=Clamp.BEFORE, limit=7.0),
            "has_gate": False,
            "has_bias": True,
            "is_transposed": True,
            "is_interleaved": True,
        }.items()
    },
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_else_is_believed(other):
    assert Measurements((measured(),)).find(build_key(*OTHERS[other])) is None


@pytest.mark.parametrize("rows", [32768, 40000, 65535])
def test_a_measurement_counts_for_its_bucket(rows):
    key = build_key(replace(SHAPES, num_rows=rows), H100)
    assert Measurements((measured(),)).find(key) == measured()


def test_entries_that_do_not_say_the_form_are_of_swiglu(tmp_path):
    """Written before there were others."""
    payload = json.loads(json.dumps(GOOD))
    assert payload["entries"][0]["key"].pop("form") == "silu"
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(payload))
    assert read_entries(path) == [measured()]


def test_shipped_measurements_are_found_with_any_versions_and_come_second():
    shipped = measured({"triton": 1.0})
    key = build_key(SHAPES, replace(H100, torch_version="2.14.0", triton_version="3.10.0"))
    assert Measurements((), (shipped,)).find(key) == shipped
    assert Measurements((measured(),), (shipped,)).find(key) == shipped
    assert Measurements((measured(),), (shipped,)).find(KEY) == measured()
    other_gpu = build_key(SHAPES, replace(H100, name="NVIDIA H200"))
    assert Measurements((), (shipped,)).find(other_gpu) is None
    assert Measurements((measured(),)).find(None) is None


def test_what_is_shipped_can_be_read():
    """No GPU could be had yet: this is the line to change with the first measurements."""
    assert read_entries(SHIPPED_PATH) == []


GOOD = {"version": 2, "entries": [measured().as_json()]}


def _spoilt(*path, value):
    payload = json.loads(json.dumps(GOOD))
    place = payload
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(payload)


DAMAGED = {
    "half written": json.dumps(GOOD)[:200],
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "the version before": _spoilt("version", value=1),
    "no entries": '{"version": 2}',
    "entries of another form": _spoilt("entries", value=3),
    "another field": _spoilt("entries", 0, "speed", value=3),
    "times that are none": _spoilt("entries", 0, "times_ms", value=3),
    "a time in words": _spoilt("entries", 0, "times_ms", "triton", value="fast"),
    "a key in words": _spoilt("entries", 0, "key", "rows", value="many"),
    "a key that is none": _spoilt("entries", 0, "key", value=[]),
    "tiles that are none": _spoilt("entries", 0, "tiles", "up", "block_m", value=-1),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_and_left_alone(damage, tmp_path, monkeypatch):
    path, content = tmp_path / "kernels.json", DAMAGED[damage]
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    measurements = read_measurements()
    assert measurements.own == ()
    assert measurements.problem.startswith(
        f"{path} is damaged, or not a file of measurements that this version can read ("
    )
    assert measurements.problem.endswith(
        "); remove it, or name another folder in MEGABLOCKS_UTILS_CACHE"
    )
    with pytest.raises(ConfigurationError) as caught:
        store_entry(measured(), path)
    assert str(caught.value) == f"{measurements.problem}."
    assert path.read_bytes() == content


def test_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    (tmp_path / "kernels.json").mkdir()
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    assert read_measurements().problem == (
        f"the measurements in {tmp_path / 'kernels.json'} cannot be read: Is a directory"
    )
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError) as caught:
        store_entry(measured(), file / "kernels.json")
    assert str(caught.value) == (
        f"the measurements cannot be written to {file / 'kernels.json'}: File exists; name another "
        "folder in MEGABLOCKS_UTILS_CACHE."
    )


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "kernels.json"
    entries = [measured(shapes=replace(SHAPES, num_rows=2**n)) for n in range(12)]
    at_once = threading.Barrier(len(entries))

    def write(entry):
        at_once.wait()
        store_entry(entry, path)

    threads = [threading.Thread(target=write, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.key.rows for entry in read_entries(path)) == [2**n for n in range(12)]


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv("MEGABLOCKS_UTILS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_path() == Path("/home/somebody/.cache/megablocks_utils/kernels.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_path() == Path("/caches/megablocks_utils/kernels.json")
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", "~/mine")
    assert cache_path() == Path("/home/somebody/mine/kernels.json")
