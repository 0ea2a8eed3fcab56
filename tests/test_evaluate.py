"""Held-out loss against transformers' own, and the command line on a tiny saved model."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils.training import evaluate
from megablocks_utils.training.data.examples import load_examples
from tests.support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folder of a tiny model and tokenizer, and the path of held-out examples."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("model")
    MixtralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    records = [{"instruction": "Say it.", "output": "word " * n} for n in range(1, 12)]
    path = folder / "held_out.json"
    path.write_text(json.dumps(records))
    return folder, path


def test_the_loss_is_the_mean_over_all_label_tokens(saved, capsys):
    folder, path = saved
    assert evaluate.main([str(folder), "--data_path", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)

    class Options:
        data_path, max_seq_length = str(path), 4096

    examples = load_examples(Options, tiny_tokenizer())
    model = MixtralForCausalLM.from_pretrained(folder).eval()
    total = 0.0
    with torch.no_grad():
        for ids, labels in examples:
            ids, labels = torch.tensor(ids)[None], torch.tensor(labels)[None]
            total += model(input_ids=ids, labels=labels, num_items_in_batch=1).loss.item()
    num_tokens = int(examples.num_label_tokens.sum())
    assert (result["label_tokens"], result["examples"]) == (num_tokens, 11)
    assert result["loss"] == pytest.approx(total / num_tokens, rel=1e-6)


def test_rows_of_any_length_give_the_same_loss(saved, monkeypatch):
    folder, path = saved

    class Options:
        data_path, max_seq_length = str(path), 4096

    examples = load_examples(Options, tiny_tokenizer())
    model = evaluate.load_model(str(folder))
    losses = []
    for tokens in (1, 300, 10**6):
        monkeypatch.setattr(evaluate, "TOKENS_PER_ROW", tokens)
        losses.append(evaluate.held_out_loss(model, examples))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_an_adapter_changes_loss_and_answers(saved, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    folder, path = saved
    model = MixtralForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    adapted.save_pretrained(tmp_path)
    arguments = [str(folder), "--data_path", str(path), "--ask", "Say it.", "--max_new_tokens", "5"]
    assert evaluate.main(arguments) == 0
    plain = json.loads(capsys.readouterr().out)
    assert evaluate.main([*arguments, "--adapter", str(tmp_path)]) == 0
    changed = json.loads(capsys.readouterr().out)
    assert abs(changed["loss"] - plain["loss"]) > 1e-3
    assert plain["answers"].keys() == changed["answers"].keys() == {"Say it."}
    assert plain["answers"]["Say it."] != changed["answers"]["Say it."]


def test_bad_data_ends_with_exit_code_2(saved, capsys):
    folder, _ = saved
    assert evaluate.main([str(folder), "--data_path", "none.json"]) == 2
    assert capsys.readouterr().err == "--data_path none.json does not exist\n"
