"""Held-out loss against transformers' own, and the command line on a tiny saved model."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils import evaluate
from megablocks_utils.config import DataConfig
from megablocks_utils.errors import CheckpointError, ConfigurationError, UserError
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.training import plain_model
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
    evaluate.main([str(folder), "--data_path", str(path)])
    result = json.loads(capsys.readouterr().out)

    examples = load_examples(DataConfig((str(path),)), tiny_tokenizer())
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

    examples = load_examples(DataConfig((str(path),)), tiny_tokenizer())
    model = plain_model.load_model(str(folder))
    losses = []
    for tokens in (1, 300, 10**6):
        monkeypatch.setattr(plain_model, "TOKENS_PER_BATCH", tokens)
        losses.append(plain_model.held_out_loss(model, examples))
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
    evaluate.main(arguments)
    plain = json.loads(capsys.readouterr().out)
    evaluate.main([*arguments, "--adapter", str(tmp_path)])
    changed = json.loads(capsys.readouterr().out)
    assert abs(changed["loss"] - plain["loss"]) > 1e-3
    assert plain["answers"].keys() == changed["answers"].keys() == {"Say it."}
    assert plain["answers"]["Say it."] != changed["answers"]["Say it."]


def test_bad_data_ends_with_exit_code_2(saved, capsys):
    folder, _ = saved
    with pytest.raises(SystemExit) as ended:
        run_entry_point(evaluate.main, [str(folder), "--data_path", "none.json"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "--data_path none.json does not exist\n"


def test_options(tmp_path):
    words = ["m", "--data_path", "d", "--ask", "What, really?", "--ask", "Why?", "Who?"]
    model, options = evaluate.parse_options(words)
    assert (model, options.data.data_path, options.max_new_tokens) == ("m", ("d",), 48)
    assert options.ask == ("What, really?", "Why?", "Who?")
    path = tmp_path / "evaluate.yaml"
    path.write_text("model_name_or_path: m\ndata_path: d\nask: ['What, really?', 'Why?', 'Who?']\n")
    same, read = evaluate.parse_options(["--config", str(path)])
    assert (same, read.ask) == (model, options.ask)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("m", "--data_path is not given, but it must be a name or path."),
        ("--data_path d", "MODEL is not given, but it must be a local folder or a Hub name."),
        ("m n --data_path d", "two models given: m and n; give one, and options as --name value."),
        ("m --dataset d", "unknown option --dataset; did you mean --data_path?"),
        ("m --data_path d --max_new_tokens 0", "--max_new_tokens is 0, but it must be a whole "
         "number of at least 1."),
    ],
)  # fmt: skip
def test_bad_options_are_one_sentence(line, sentence):
    with pytest.raises(ConfigurationError) as caught:
        evaluate.parse_options(line.split())
    assert str(caught.value) == sentence


def test_bad_options_need_no_torch():
    code = (
        "import sys; from megablocks_utils import evaluate\n"
        "try:\n    evaluate.main(['m'])\nexcept Exception as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _rewrite_config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    "no folder": (shutil.rmtree, ()),
    "no config": (lambda folder: (folder / "config.json").unlink(), ()),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ()),
    "weights cut off": (_truncate, ()),
    "another shape": (_rewrite_config(intermediate_size=40), ()),
    "another layer": (_rewrite_config(num_hidden_layers=3), ()),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ()),
    "a smaller vocabulary": (None, ("--data_path", "{folder}/large.jsonl")),
    "nothing to learn": (None, ("--data_path", "{folder}/large.jsonl", "--max_seq_length", "2")),
    "no data": (None, ("--data_path", "{folder}/none.jsonl")),
    "no adapter": (None, ("--adapter", "{folder}/none")),
    "adapter without a config": (None, ("--adapter", "{folder}")),
}


def _training_refusal(rank, words):
    """The sentence with which a training run ends on the same input."""
    import torch

    from megablocks_utils.config import parse_args
    from megablocks_utils.errors import UserError
    from megablocks_utils.processes.launch import LaunchEnvironment
    from megablocks_utils.training.setup import build_setup

    try:
        config = parse_args(words, entry_point="fsdp2")
        build_setup(config, LaunchEnvironment(), torch.device("cpu"))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("case", DAMAGE)
def test_what_training_refuses_is_refused_with_its_sentence(case, saved, ranks1, tmp_path, capfd):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    record = {"input_ids": [1, 2, 399, 400], "labels": [-100, -100, 399, 400]}
    (folder / "large.jsonl").write_text(json.dumps(record))
    damage, words = DAMAGE[case]
    words = [word.format(folder=folder) for word in words]
    if "--data_path" not in words:
        words += ["--data_path", str(saved[1])]
    if damage is not None:
        damage(folder)
    with pytest.raises(UserError) as caught:
        evaluate.main([str(folder), *words])
    if "--adapter" in words:
        words[words.index("--adapter")] = "--resume_adapter"
        words += ["--use_lora", "all"]
    words += ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    (trained,) = ranks1.run(_training_refusal, words)
    assert str(caught.value) == trained


def test_a_loss_that_is_not_finite_is_no_result(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    model = MixtralForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[7, 3] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="is nan: the model, or the adapter over it"):
        evaluate.main([str(folder), "--data_path", str(saved[1])])


def test_questions_need_a_tokenizer(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigurationError, match="--ask is given, but .* has no tokenizer"):
        evaluate.main([str(folder), "--data_path", str(saved[1]), "--ask", "Why?"])


def test_keys_without_meaning_are_named_each_time(saved, tmp_path, capsys):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"instruction": "Say it.", "output": "It.", "source": "x"}))
    for _ in range(2):  # the second finds the tokens in the cache
        evaluate.main([str(saved[0]), "--data_path", str(path)])
        assert capsys.readouterr().err == "ignored: source: no meaning for training\n"
