"""Adapters to spoil, and what is said when they are opened then."""

import shutil

import pytest

from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.lora.trainable import settings_of_adapter
from tests.support.tiny_adapters import save_fused_adapter, save_separate_adapter
from tests.support.tiny_models import build_tiny_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_fused_adapter("mixtral", folder / "fused")
    save_separate_adapter("mixtral", folder / "separate")
    return folder


@pytest.fixture(scope="session")
def model():
    return build_tiny_model("mixtral")


@pytest.fixture
def fused(saved, tmp_path):
    return shutil.copytree(saved / "fused", tmp_path / "fused")


@pytest.fixture
def separate(saved, tmp_path):
    return shutil.copytree(saved / "separate", tmp_path / "separate")


@pytest.fixture
def refusal(model, monkeypatch):
    """Open an adapter that is refused, and return the sentence; no weight may be read for it."""

    def read(index, key):
        raise AssertionError(f"{key} was read")

    def refuse(folder):
        with monkeypatch.context() as patched:
            patched.setattr("megablocks_utils.checkpoint.index.CheckpointIndex.read", read)
            with pytest.raises(CheckpointError) as error:
                settings_of_adapter(open_adapter(folder, model), model)
        return str(error.value)

    return refuse
