"""The comparison of logits with plain PEFT: what it accepts and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.lora.file_check import AdapterCheckError
from megablocks_utils.lora.logits_check import (
    check_logits,
    compare_logits,
    compute_logits,
    needed_bytes,
)
from tests.support.parity import save_adapter
from tests.support.tiny_models import build_tiny_model, save_tiny_model

TOKENS = torch.arange(3, 43)[None]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model and an adapter that PEFT has written."""
    folder = tmp_path_factory.mktemp("logits")
    save_tiny_model("mixtral", folder / "model")
    save_adapter(folder / "adapter", folder / "model", "all", rank=4)
    return folder


def _logits(folder, dtype=torch.float32, adapter="adapter"):
    """Return what a right trained model would give: stock with W + B A, grouped products."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    model = PeftModel.from_pretrained(model, folder / adapter).to(dtype).eval()
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def _check(folder, logits, dtype, adapter="adapter"):
    return check_logits(
        folder / adapter,
        folder / "model",
        TOKENS,
        logits,
        compute=dtype,
        plain=build_tiny_model("mixtral"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_logits_pass_in_the_dtype_of_compute(folder, dtype):
    found = _check(folder, _logits(folder, dtype), dtype)
    assert found.ours <= 2 * found.stock
    assert found.stock < (1e-6 if dtype == torch.float32 else 3e-2)
    assert found.effect > 0.05
    assert not found.is_hidden


class _CastsWithin(torch.nn.Linear):
    """Casts what it multiplies with its weight, as some models do."""

    def forward(self, tokens, use_cache):
        hidden = self.weight[tokens[0]].float()
        return SimpleNamespace(logits=torch.nn.functional.linear(hidden, self.weight))


def test_a_model_that_casts_within_is_computed_in_float64():
    model = _CastsWithin(8, 64)
    wide = compute_logits(model.double(), TOKENS)
    assert torch.equal(wide, model.weight[TOKENS[0]] @ model.weight.T)
    assert compute_logits(model.float(), TOKENS).dtype == torch.float32


def _change(folder, name, change):
    tensors = load_file(folder / "adapter" / WEIGHTS)
    (folder / name).mkdir(exist_ok=True)
    config = (folder / "adapter" / "adapter_config.json").read_text()
    (folder / name / "adapter_config.json").write_text(config)
    changed = {key: change(key, tensor).contiguous() for key, tensor in tensors.items()}
    save_file(changed, folder / name / WEIGHTS, metadata={"format": "pt"})


def _scramble(key, tensor):
    if "experts" in key and "lora_B" in key:
        return tensor.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)
    return tensor


def _halve(key, tensor):
    return tensor / 2 if "lora_B" in key else tensor


@pytest.mark.parametrize("change", [_scramble, _halve], ids=["scrambled", "half as strong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_adapter_is_refused_in_every_dtype(folder, change, dtype):
    _change(folder, change.__name__, change)
    with pytest.raises(AdapterCheckError, match="plain PEFT loads the written adapter, but "):
        _check(folder, _logits(folder, dtype), dtype, change.__name__)


def _noisy(seed, size, like):
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return like + size * noise.to(like)


def test_rounding_that_hides_the_adapter_is_no_fault():
    """The effect is a thousand times smaller than rounding: its share is noise."""
    exact = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0)).double()
    without = _noisy(1, 1e-5, exact)
    found = compare_logits(_noisy(2, 1e-2, exact), _noisy(3, 1e-2, exact), exact, without)
    assert found.is_hidden
    assert abs(found.share - 1) > 1
    assert found.find_fault() is None


def test_errors_that_rounding_does_not_explain_are_a_fault():
    """Also where the adapter's whole effect is there: something else is wrong."""
    exact = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0)).double()
    without = _noisy(1, 1e-2, exact)
    stock = _noisy(3, 1e-7, exact)
    found = compare_logits(_noisy(2, 5e-7, exact), stock, exact, without)
    assert found.share == pytest.approx(1.0, abs=1e-3)
    fault = found.find_fault()
    assert fault == (
        f"its logits are {found.ours:.1e} from those of the trained model, where rounding explains "
        f"{found.stock:.1e}"
    )
    assert compare_logits(_noisy(2, 3e-7, exact), stock, exact, without).find_fault() is None


def test_an_adapter_that_is_missing_shows_beside_rounding_of_its_size():
    """Errors alone could not tell: 1.4e-2 where rounding explains 1e-2."""
    exact = torch.randn(1, 40, 128, dtype=torch.float64)
    without = _noisy(1, 1e-2, exact)
    stock = _noisy(3, 0.9e-2, exact)
    right = compare_logits(_noisy(2, 0.9e-2, exact), stock, exact, without)
    assert right.find_fault() is None
    assert right.share == pytest.approx(1.0, abs=0.1)
    wrong = compare_logits(_noisy(2, 0.9e-2, without), stock, exact, without)
    assert wrong.ours < 2 * wrong.stock
    fault = wrong.find_fault()
    assert fault == f"the trained model's logits show {wrong.share:.1%} of the change it makes"
    assert abs(wrong.share) < 0.1


def test_rounding_that_has_a_direction_is_stocks_too():
    """As with bfloat16 on few tokens: what stock shows too much of, the trained model may."""
    exact = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).double()
    without = _noisy(1, 0.2, exact)
    change = exact - without
    ours, stock = exact + 0.34 * change, exact + 0.23 * change
    assert compare_logits(ours, stock, exact, without).find_fault() is None
    assert compare_logits(exact + change, stock, exact, without).find_fault() is not None


def test_an_adapter_without_effect_is_no_fault():
    exact = torch.randn(1, 4, 8, dtype=torch.float64)
    found = compare_logits(exact, _noisy(1, 1e-7, exact), exact, exact)
    assert (found.ours, found.effect, found.share) == (0.0, 0.0, 1.0)
    assert found.find_fault() is None


def test_memory_that_the_check_needs():
    """Weights in the next higher precision."""
    assert needed_bytes(10, torch.float32) == 80
    assert needed_bytes(10, torch.bfloat16) == 40
