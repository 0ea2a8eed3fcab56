"""The final model has the dtype asked for, but is not lost for a value that this cannot hold."""

import io
from types import SimpleNamespace

import torch
from rich.console import Console

from megablocks_utils.training.saved_specs import choose_saved_specs
from tests.support.tiny_families import build_tiny

NAME = "lm_head.weight"


def _choose(rank, largest):
    """Return the warning and the dtypes on a rank; the last one's weights hold this value."""
    model = build_tiny("mixtral")
    if rank == 1:
        model.lm_head.weight.data[3, 1] = largest
    console = Console(record=True, width=300, file=io.StringIO())
    saving = SimpleNamespace(save_dtype="float16")
    setup = SimpleNamespace(config=SimpleNamespace(saving=saving), console=console, model=model)
    specs = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    chosen = choose_saved_specs(setup, model, specs)
    assert [spec[:2] for spec in chosen] == [spec[:2] for spec in specs]
    return console.export_text().strip(), {dtype for *_, dtype in chosen}


def test_all_ranks_choose_the_same(ranks2):
    assert ranks2.run(_choose, 65504.0) == [("", {torch.float16})] * 2
    warning = (
        f"warning: --save_dtype is float16, which ends at 65504, but {NAME} holds 70000: the model"
        " is written in the dtype it was trained in"
    )
    assert ranks2.run(_choose, -70000.0) == [(warning, {torch.float32})] * 2
