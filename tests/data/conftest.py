"""The scripts of ``data/`` as modules, found as they find each other."""

import importlib
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def script(monkeypatch):
    """Import one of the folder's scripts by name."""
    monkeypatch.syspath_prepend(str(DATA))
    return importlib.import_module
