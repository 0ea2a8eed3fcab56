"""A full disk is told by what tokenizers and safetensors raise for it."""

import pytest
import torch
from safetensors.torch import save_file

from megablocks_utils.checkpoint.library_errors import DiskErrorsAsOSErrors
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_libraries_in_rust_raise_what_the_system_said(tmp_path):
    with pytest.raises(OSError, match="No space left on device"), DiskErrorsAsOSErrors():
        tiny_tokenizer().backend_tokenizer.save("/dev/full")
    with pytest.raises(OSError, match="No such file or directory"), DiskErrorsAsOSErrors():
        save_file({"x": torch.zeros(1)}, tmp_path / "none" / "x.safetensors")
    with pytest.raises(ValueError, match="^mine$"), DiskErrorsAsOSErrors():
        raise ValueError("mine")
