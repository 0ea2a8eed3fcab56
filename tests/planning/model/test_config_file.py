"""MODEL is found on this machine, or one sentence says that it is not."""

import json

import pytest
from huggingface_hub import constants

from megablocks_utils.errors import CheckpointError
from megablocks_utils.planning.model.config_file import (
    find_config_file,
    launch_name,
    read_config_file,
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, with the config of one model in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--moe"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    path = folder / "snapshots" / "abc" / "config.json"
    path.write_text('{"a": 1}')
    return path


def test_a_hub_name_in_the_cache(hub):
    assert find_config_file("org/moe") == hub
    assert read_config_file(hub) == {"a": 1}
    assert launch_name("org/moe") == "org/moe"


@pytest.mark.parametrize("name", ["org/other", "org", "no name/at all", "a" * 200])
def test_a_name_that_is_not_there(hub, name):
    with pytest.raises(CheckpointError) as caught:
        find_config_file(name)
    assert str(caught.value) == (
        f"MODEL is {name}, but it is neither a folder or file here nor a model in the local cache "
        f"of the Hub; nothing is downloaded: run hf download {name} config.json, or give a "
        "config.json."
    )


def test_files_and_folders(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"but that folder has no config\.json\.$"):
        find_config_file(str(tmp_path))
    path.write_text(json.dumps({"a": 2}))
    assert find_config_file(str(tmp_path)) == find_config_file(str(path)) == path
    assert launch_name(str(path)) == launch_name(str(tmp_path)) == str(tmp_path)
    other = tmp_path / "mixtral.json"
    other.write_text("{}")
    assert find_config_file(str(other)) == other
    assert launch_name(str(other)) == str(other)
    for missing in (tmp_path / "none", "./none", "a/b/c", "none.json"):
        with pytest.raises(CheckpointError, match=r"but there is no such file or folder\.$"):
            find_config_file(str(missing))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read: it is not valid JSON."), ("[]", "no JSON object.")]
)
def test_files_that_hold_no_settings(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_config_file(path)
    assert str(caught.value).endswith(words)
