"""Keep out of a log what other libraries show on the way: progress bars, and their own warnings.

tqdm redraws a bar after a carriage return, and in a file every one of its states stays. So where
standard error is no terminal, bars are switched off by the library's own switch. A warning that is
for the authors of another library to act on is filtered by its place and text; a test notices when
that is no longer needed.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["filter_peft_warnings", "without_datasets_bars", "without_transformers_bars"]


@contextmanager
def without_transformers_bars() -> Iterator[None]:
    """Load or save a model without transformers' bars, unless standard error is a terminal.

    `from_pretrained` of transformers 5.23 shows "Loading weights" whatever it writes to.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    has_hub_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()  # and the Hub's with them
        if not has_hub_bars:
            disable_progress_bars()


@contextmanager
def without_datasets_bars() -> Iterator[None]:
    """Load a data set without the bars of datasets, unless standard error is a terminal.

    `load_dataset` of datasets 5.2 shows "Generating train split" whatever it writes to.
    """
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def filter_peft_warnings() -> Iterator[None]:
    """Make or load a `PeftModel` without a warning that is PEFT's to mend.

    PEFT 0.21 (`peft_model.py`, `mixed_model.py`) asks models for `is_gradient_checkpointing`, a
    name that transformers 5.23 has deprecated.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="`is_gradient_checkpointing` is deprecated",
            category=FutureWarning,
            module=r"transformers\.modeling_utils",
        )
        yield
