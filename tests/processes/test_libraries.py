"""Versions that are too old, and what torch's allocator is told."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from megablocks_utils.processes import entry_point
from megablocks_utils.processes.libraries import OLDEST, set_allocator

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_the_oldest_are_those_of_the_package():
    required = dict(line.split(">=") for line in PROJECT["dependencies"])
    for name, oldest in OLDEST.items():
        assert required[name].startswith(".".join(map(str, oldest)) + ","), name


@pytest.mark.parametrize(
    ("name", "version", "is_refused"),
    [
        ("transformers", "5.17.0", True),
        ("torch", "2.9.1+cu130", True),
        ("torch", "2.11.0a0+nv26.1", False),  # a vendor's build
        ("torch", "3.0.0", False),
    ],
)
def test_an_old_library_is_one_sentence(name, version, is_refused, monkeypatch, capsys):
    find = metadata.version
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(metadata, "version", lambda n: version if n == name else find(n))
    called = []
    if not is_refused:
        entry_point.run_entry_point(called.extend, ["--debug"])
        assert called == ["--debug"]
        return
    with pytest.raises(SystemExit) as end:
        entry_point.run_entry_point(called.extend, ["--debug"])
    oldest = ".".join(map(str, OLDEST[name]))
    assert (end.value.code, called) == (2, [])
    assert capsys.readouterr().err == (
        f"{name} {version} is installed, but it must be {oldest} or newer; requirements.txt lists "
        "versions that work.\n"
    )


def test_the_allocator_is_told_before_torch_comes_unless_the_user_has(monkeypatch):
    told = {}

    def main(argv):
        told.update(os.environ)

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    entry_point.run_entry_point(main, [])
    assert told["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    theirs = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    wanted = dict(theirs)
    set_allocator(theirs)
    assert theirs == wanted
