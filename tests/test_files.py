"""Files are complete or not there at all."""

import json
import math

import pytest

from megablocks_utils.files import (
    finite_or_none,
    publish_file,
    write_json_atomically,
)


def test_a_failing_block_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="^torn$"), publish_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("torn")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_the_name_changes_only_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with publish_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_unwritable_payload_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json_atomically(tmp_path / "a.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_json_is_strict_where_numbers_are_not_finite(tmp_path):
    payload = {"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf, 2)}, "e": "x"}
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "x"}
    assert finite_or_none(payload) == expected
    write_json_atomically(tmp_path / "a.json", payload)
    assert json.loads((tmp_path / "a.json").read_text()) == expected
