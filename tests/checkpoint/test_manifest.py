"""The manifest: whatever was changed after it was written is noticed and named."""

import json
import re

import pytest

from megablocks_utils.checkpoint.manifest import (
    check_files,
    describe_file,
    read_manifest,
    write_manifest,
)
from megablocks_utils.errors import CheckpointError

CONTENTS = {"step": 3, "mesh": {"dp": 2, "ep": 1}, "train_runtime_s": 0.1}
# sha256 of "abc", the first example of FIPS 180.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folder(tmp_path):
    """Two files and a manifest of them."""
    (tmp_path / "b").write_text("abc")
    (tmp_path / "a").write_text("other")
    files = {name: describe_file(tmp_path / name) for name in ("b", "a")}
    write_manifest(tmp_path, CONTENTS, files)
    return tmp_path


def test_manifest_comes_back_as_it_was_written(folder):
    manifest = read_manifest(folder)
    assert {name: manifest[name] for name in CONTENTS} == CONTENTS
    assert manifest["format"] == 1
    assert list(manifest["files"]) == ["a", "b"]
    assert manifest["files"]["b"] == {"bytes": 3, "sha256": ABC}
    check_files(folder, manifest["files"], ["a", "b"])


def test_every_changed_number_of_a_manifest_is_noticed(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    digits = [match.start() for match in re.finditer(r"\d", text)]
    assert len(digits) > 20
    for place in digits:
        changed = "1" if text[place] != "1" else "2"
        path.write_text(text[:place] + changed + text[place + 1 :])
        with pytest.raises(CheckpointError, match="was altered: its content does not have its"):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json"),
        ("", "manifest.json is not valid JSON"),
        ('{"step": 3', "manifest.json is not valid JSON"),
        ("[]", "its JSON is not an object"),
        ("{}", "manifest.json was altered"),
        (b"\xff\xfe", "manifest.json is not valid JSON"),
        ('{"step": NaN}', "manifest.json is not valid JSON: NaN is no number of JSON"),
        ("[" * 200_000, "manifest.json is not valid JSON: it is nested too deeply"),
    ],
)
def test_broken_manifest_is_one_sentence(folder, content, message):
    path = folder / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("megablocks_utils.checkpoint.manifest.FORMAT_VERSION", 2)
    write_manifest(tmp_path, CONTENTS, {"b": {"bytes": 3, "sha256": ABC}})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2, but this version reads 1"):
        read_manifest(tmp_path)


def _checked(folder, *names):
    check_files(folder, json.loads((folder / "manifest.json").read_text())["files"], names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ab", r"b is truncated: it has 2 bytes, the manifest says 3"),
        ("abcd", r"b is altered: it has 4 bytes, the manifest says 3"),
        (None, "lacks its file b"),
    ],
)
def test_file_of_another_size_is_named_by_whoever_looks(folder, content, message):
    (folder / "b").unlink()
    if content is not None:
        (folder / "b").write_text(content)
    for names in ([], ["a"], ["b"]):
        with pytest.raises(CheckpointError, match=message):
            _checked(folder, *names)


def test_altered_file_is_named_by_whoever_reads_it(folder):
    (folder / "b").write_text("abd")
    with pytest.raises(
        CheckpointError, match=f"b was altered: its checksum is .*the manifest says {ABC[:12]}"
    ):
        _checked(folder, "a", "b")
    _checked(folder, "a")


def test_a_file_that_is_read_must_be_listed(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list config\.json"):
        read_manifest(folder)
    (folder / "config.json").rename(folder / "notes.md")
    read_manifest(folder)
    write_manifest(folder, CONTENTS, {})
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list any file"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name", ["../b", "/etc/passwd", "", ".", "a/../../b", "a\0", "\n"], ids=repr
)
def test_no_listed_name_leads_out_of_the_folder(folder, name):
    write_manifest(folder, CONTENTS, {name: {"bytes": 3, "sha256": ABC}})
    with pytest.raises(CheckpointError, match="names the file .* wanted is a name within its fold"):
        read_manifest(folder)


def test_a_listed_file_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "b"
    (folder / "b").rename(outside)
    (folder / "b").symlink_to(outside)
    with pytest.raises(CheckpointError, match="b leads out of its folder"):
        _checked(folder, "a")
