"""Records from docstrings: layout, split by module, nothing twice, the same every time."""

import functools
import json
import sysconfig
from pathlib import Path

SOURCE = '''
"""A module."""

def shine(lamp, *, level=1):
    """Make the lamp
    shine at a level.

    More text.
    """

def _hidden():
    """Stay unseen by everybody outside."""

def undocumented(): ...

def short():
    """Too short."""

class Lamp:
    """A lamp that can be switched on and off."""

    async def switch(self):
        """Switch the lamp and wait for it."""
'''


def test_records_of_a_module(script, tmp_path):
    path = tmp_path / "light.py"
    path.write_text(SOURCE)
    assert script("prepare_docs").module_records("light", path) == [
        {
            "instruction": "What does the Python function `light.shine(lamp, *, level=1)` do?",
            "output": "Make the lamp shine at a level.",
        },
        {
            "instruction": "What does the Python class `light.Lamp` do?",
            "output": "A lamp that can be switched on and off.",
        },
        {
            "instruction": "What does the Python method `light.Lamp.switch(self)` do?",
            "output": "Switch the lamp and wait for it.",
        },
    ]


def test_the_standard_library_gives_thousands_split_by_module(script, tmp_path, monkeypatch):
    docs, stdlib = script("prepare_docs"), Path(sysconfig.get_paths()["stdlib"])
    assert docs.collect(stdlib / "email") == docs.collect(stdlib / "email") != ([], [])
    monkeypatch.setattr(docs, "collect", functools.cache(docs.collect))  # all takes seconds
    assert docs.main(["--output", str(tmp_path)]) == 0
    train = json.loads((tmp_path / "docs_train.json").read_text())
    held_out = json.loads((tmp_path / "docs_held_out.json").read_text())
    assert len(train) > 2000 and len(held_out) > 200
    everything = train + held_out
    for column in ("instruction", "output"):
        assert len({record[column] for record in everything}) == len(everything)
    assert not modules(train) & modules(held_out)
    assert docs.collect(stdlib) == (train, held_out)


def modules(records):
    return {record["instruction"].split("`")[1].split(".")[0] for record in records}
