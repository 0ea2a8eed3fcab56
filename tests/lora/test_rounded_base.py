"""A base is read with its experts as a format keeps them; `test_merge_weights.py` has the rest."""

import torch

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.lora.rounded_base import RoundedBase
from tests.support.quantized_models import save_quantized


def test_what_is_stored_in_the_format_is_not_rounded_again(tmp_path):
    """As a run keeps its bits: packed again, these blocks would be other numbers."""
    folder = save_quantized("deepseek_v3, own blocks", tmp_path)
    index, model = open_checkpoint(folder, dtype=torch.float32), build_model_on_meta(folder)
    layout = ModelLayout(model, index)
    (kept, rounded) = (RoundedBase(index, layout, model, name) for name in ("fp8", "int8"))
    experts = [key for key in index if ".experts." in key]
    assert len(experts) == 3 * 8 * 3  # of three layers
    assert not any(map(kept.is_rounded, index))
    assert [key for key in index if rounded.is_rounded(key)] == experts
    for key in experts[:3]:
        assert torch.equal(kept.read(key), index.read(key))
        assert not torch.equal(rounded.read(key), index.read(key))
    assert kept.error == 0 < rounded.error
    assert kept.is_exact and not rounded.is_exact
