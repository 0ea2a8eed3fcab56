"""What must be the same on all ranks, and what may differ."""

import pytest

from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.processes.rank_facts import describe_difference, describe_run, hash_sources

BASE = ["--model_name_or_path", "a", "--data_path", "b.json", "--output_dir", "out"]


def facts(*words: str, environ: dict | None = None) -> dict[str, str]:
    config, leftovers = parse_known_args([*BASE, *words], entry_point="fsdp1")
    return describe_run(config, leftovers, environ or {})


@pytest.mark.parametrize(
    "words",
    [
        ("--seed", "3"),
        ("--learning_rate", "1e-3"),
        ("--max_steps", "9"),
        ("--gradient_accumulation_steps", "2"),
        ("--gradient_checkpointing", "selective"),
        ("--adam_beta1", "0.5"),  # of TrainingArguments
    ],
)
def test_an_option_that_differs_is_named_with_both_values(words):
    here, there = facts(), facts(*words)
    sentence = describe_difference(there, here, rank="rank 2 on b", rank_0="rank 0 on a")
    assert sentence.startswith(f"rank 2 on b has {words[0]} ")
    assert f", but rank 0 on a has {words[0]} " in sentence
    assert "more differ" not in sentence


def test_paths_to_what_is_compared_later_may_differ():
    words = ["--model_name_or_path", "c", "--data_path", "d.json", "--output_dir", "out"]
    assert describe_run(parse_args(words, entry_point="fsdp1"), (), {}) == facts()
    other = describe_run(parse_args([*words[:-1], "other"], entry_point="fsdp1"), (), {})
    assert {name for name in other if other[name] != facts()[name]} == {"--output_dir"}


def test_scripts_versions_and_launcher_settings_count():
    both = facts(), describe_run(parse_args(BASE, entry_point="fsdp2"), (), {})
    assert both[0]["--entry_point"] != both[1]["--entry_point"]
    for name in ("torch", "transformers", "accelerate", "peft", "numpy", "triton", "Python"):
        assert facts()[name]
    dynamo = facts(environ={"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "HOME": "x"})
    assert set(dynamo) - set(facts()) == {"ACCELERATE_DYNAMO_BACKEND"}
    sentence = describe_difference(dynamo | {"torch": "1"}, facts(), rank="b", rank_0="a")
    assert "b has torch 1 and ACCELERATE_DYNAMO_BACKEND INDUCTOR, but a has torch 2" in sentence
    assert " and ACCELERATE_DYNAMO_BACKEND not set; all ranks " in sentence


def test_any_change_of_the_sources_counts(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("x = 1")
    before = hash_sources(tmp_path)
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "b.pyc").write_text("")
    assert hash_sources(tmp_path) == before
    (tmp_path / "a" / "b.py").write_text("x = 2")
    assert hash_sources(tmp_path) != before
