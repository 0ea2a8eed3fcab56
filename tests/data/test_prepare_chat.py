"""The chatterbot corpus without its repetitions."""

import importlib.util

CORPUS = """
categories: [test]
conversations:
- [what is rain, water from clouds]
- [What is rain, something else]
- [alone]
- [2, 3, 4]
"""


def test_every_question_is_kept_once(script, tmp_path):
    (tmp_path / "a.yml").write_text(CORPUS)
    (tmp_path / "b.yml").write_text(CORPUS)
    train, held_out = script("prepare_chat").collect(tmp_path)
    assert sorted(train + held_out, key=lambda record: record["instruction"]) == [
        {"instruction": "2", "output": "3"},
        {"instruction": "what is rain", "output": "water from clouds"},
    ]


def test_a_missing_package_is_named_with_its_install_line(script, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script("prepare_chat").main([]) == 2
    assert capsys.readouterr().err == (
        "the package chatterbot_corpus is not installed; run: "
        "pip install --no-deps chatterbot-corpus==1.3.3\n"
    )
