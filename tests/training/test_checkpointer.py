"""The thread that saves in the background."""

import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from megablocks_utils.training.checkpointer import Checkpointer


def test_a_save_in_the_background_uses_this_processs_gpu(monkeypatch, tmp_path):
    """A thread begins with GPU 0, where the contexts of all ranks would take memory."""
    made_current = []

    def set_device(device):
        made_current.append((str(device), threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    config = SimpleNamespace(output_dir=str(tmp_path), saving=SimpleNamespace(time_limit=None))
    for device, wanted in (("cuda:3", [("cuda:3", "checkpoint_0")]), ("cpu", [])):
        made_current.clear()
        setup = SimpleNamespace(
            launch=SimpleNamespace(rank=3),
            config=config,
            resume=None,
            device=torch.device(device),
        )
        checkpointer = Checkpointer(setup, Path("metrics.jsonl"))
        checkpointer._background.submit(int).result()
        checkpointer._background.shutdown()
        assert made_current == wanted
