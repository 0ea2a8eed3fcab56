"""Whatever a file of settings holds, it gives values of the right types or one sentence."""

import json
import os

import pytest

from megablocks_utils.checkpoint.json_file import JsonObject, read_settings
from megablocks_utils.errors import CheckpointError


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        read_settings(path, "model")
    message = str(error.value)
    assert str(path.parent) in message and "\n" not in message and len(message) < 400
    message.encode()
    return message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\0", "Expecting value"),
        (b'{"a": "\xff"}', "its text is not UTF-8"),
        (b'{"a": "\\udcff"}', "its text is not UTF-8"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": [1, -Infinity]}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": 1, "a": 1}', "a is there twice"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
    ids=lambda value: repr(value[:9]) if isinstance(value, bytes) else "",
)
def test_contents(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_what_is_no_regular_file(tmp_path):
    path = tmp_path / "config.json"
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)):
        make(path)
        assert "has no config.json" in refusal(path)
        path.rmdir() if path.is_dir() else path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "it has over 100,000,000 bytes" in refusal(path)


def test_a_pair_of_surrogates_and_other_scripts_are_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "\N{GRINNING FACE} \N{GREEK SMALL LETTER ALPHA}"}))
    assert read_settings(path, "model")["a"] == "\N{GRINNING FACE} \N{GREEK SMALL LETTER ALPHA}"


VALUES = {
    "text": ("x", [1, None, True, [], {}]),
    "whole_number": (2**63 - 1, [-1, 1.0, True, "1", None, 2**63, 10**30, 10**5000, [], {}]),
    "number": (0.5, [-1, True, "x", None, float("inf"), float("nan"), 10**400, [], {}]),
    "section": ({"a": 1}, [[], "x", None, 1]),
    "texts": (["a", "b"], ["ab", [1], [None], None, {"a": 1}]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_another_type_are_named_with_file_and_name(tmp_path, kind):
    good, bad = VALUES[kind]
    path = tmp_path / "manifest.json"
    getattr(JsonObject(path, {"key": good}), kind)("key")
    for value in bad:
        with pytest.raises(CheckpointError) as error:
            getattr(JsonObject(path, {"key": value}, "files"), kind)("key")
        message = str(error.value)
        assert message.startswith(f"{path} has files key ") and ", wanted is a" in message
        assert len(message) < 400
    with pytest.raises(CheckpointError, match="has no key, wanted is a"):
        getattr(JsonObject(path, {}), kind)("key")
