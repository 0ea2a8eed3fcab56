"""Bars and warnings of other libraries: kept out of a log, as long as they would be there."""

import warnings
from collections.abc import Callable

import datasets
import pytest
from huggingface_hub import utils as hub
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megablocks_utils.checkpoint.library_output import (
    filter_peft_warnings,
    without_datasets_bars,
    without_transformers_bars,
)
from tests.support.tiny_models import build_tiny_model, save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved model."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("olmoe", folder)
    return folder


def _shown(capfd, action: Callable[[], object]) -> str:
    capfd.readouterr()
    action()
    return capfd.readouterr().err


def test_a_model_is_loaded_without_a_bar(model_folder, capfd):
    logging.enable_progress_bar()  # a test before this one may have switched it off

    def load():
        with without_transformers_bars():
            AutoModelForCausalLM.from_pretrained(model_folder)

    assert _shown(capfd, load) == ""
    # Still needed, and only for the block: afterwards the bar is there again.
    bar = _shown(capfd, lambda: AutoModelForCausalLM.from_pretrained(model_folder))
    assert "Loading weights" in bar and "\r" in bar


def test_a_data_set_is_loaded_without_a_bar(tmp_path, capfd):
    (tmp_path / "data.jsonl").write_text('{"output": "x"}\n')

    def load(cache: str):
        files, cache_dir = str(tmp_path / "data.jsonl"), str(tmp_path / cache)
        datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache_dir)

    def load_quietly():
        with without_datasets_bars():
            load("first")

    assert _shown(capfd, load_quietly) == ""
    assert "Generating train split" in _shown(capfd, lambda: load("second"))


def test_bars_that_the_user_has_switched_off_stay_off():
    hub.disable_progress_bars()
    datasets.disable_progress_bars()
    try:
        with without_transformers_bars(), without_datasets_bars():
            pass
        assert hub.are_progress_bars_disabled() and datasets.are_progress_bars_disabled()
    finally:
        hub.enable_progress_bars()
        datasets.enable_progress_bars()


def test_pefts_warning_is_filtered_and_still_there():
    config = LoraConfig(target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with filter_peft_warnings():
            get_peft_model(build_tiny_model("olmoe"), config)
            with pytest.raises(FutureWarning, match="another"):
                warnings.warn("another", FutureWarning, stacklevel=1)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        get_peft_model(build_tiny_model("olmoe"), config)
