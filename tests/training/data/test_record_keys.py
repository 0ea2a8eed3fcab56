"""Of every key: used, ignored and named, or refused; in records of every format."""

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.formats import check_records
from megablocks_utils.training.data.record_keys import is_about_the_example
from megablocks_utils.training.data.sources import Record

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
RECORDS = {
    "instruction and output": {"instruction": "Add.", "input": "1", "output": "2"},
    "messages": {"messages": TURNS},
    "conversations": {"conversations": TURNS},
    "input_ids and labels": {"input_ids": [3, 4], "labels": [-100, 4]},
    "prompt and completion": {"prompt": "Hi", "completion": "Yo"},
    "prompt and completion of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "output alone": {"output": "### Response: Yo"},
}
ABOUT = {
    "id": 3, "idx": 3, "_id": "x", "uuid": "x", "conversation_id": "x", "prompt_id": "x",
    "__index_level_0__": 3, "Unnamed: 0": 3, "hash": "x", "source": "web", "data_source": "web",
    "dataset": "x", "dataset_name": "x", "split": "train_sft", "url": "x", "avatarUrl": "x",
    "model": "gpt", "model_name": "gpt", "license": "mit", "timestamp": "x", "created_at": 3,
    "category": "x", "topic": "x", "tags": ["a"], "task_type": "x", "language": "en", "lang": "en",
    "score": 0.5, "quality_score": 3, "difficulty": "hard", "rating": 5, "num_turns": 2,
    "n_tokens": 50, "token_count": 50, "length": 5, "metadata": {"a": 1}, "meta": "x",
    "redacted": False, "openai_moderation": [{"a": 1}], "toxic": False, "embedding": [0.1],
    "parallel_tool_calls": False,
}  # fmt: skip
COULD_MEAN = {
    "context": "Given that", "question": "Why?", "response": "So", "documents": [{"text": "a"}],
    "enable_thinking": False, "thinking": "Hm", "loss_weight": 0.5, "weight": 0, "train": False,
    "mask_type": "x", "sample_weight": 1, "chosen": "a", "rejected": "b", "label": True,
    "images": ["a.png"], "chat_template": "{{ x }}", "turns": [["Hi", "Yo"]], "tokens": ["a"],
    "tool_choice": "auto", "prefix": "a", "Größe": 3, "learn": True, "name": "Ann",
}  # fmt: skip


@pytest.mark.parametrize("format_name", RECORDS)
def test_keys_about_the_example_are_ignored_and_named_once(format_name):
    record = Record("d.jsonl:1", {**RECORDS[format_name], **ABOUT})
    plain = Record("d.jsonl:2", RECORDS[format_name])
    checked = check_records([record, plain, record])
    assert checked.data_format.name == format_name
    assert sorted(checked.ignored_keys) == sorted(ABOUT)


@pytest.mark.parametrize("format_name", RECORDS)
def test_keys_that_could_mean_something_are_refused_by_name(format_name):
    for key, value in COULD_MEAN.items():
        records = [Record("d.jsonl:1", RECORDS[format_name])]
        records += [Record("d.jsonl:2", {**RECORDS[format_name], key: value})]
        with pytest.raises(DataError) as caught:
            check_records(records)
        assert str(caught.value).startswith(f"d.jsonl:2: a record of {records_owner(format_name)}")
        assert f" has the key {key!r}: " in str(caught.value)


def records_owner(format_name):
    return format_name.removesuffix(" of messages")


@pytest.mark.parametrize("format_name", RECORDS)
@pytest.mark.parametrize("empty", [None, "", [], {}, {"a": None}])
def test_an_empty_value_is_no_key(format_name, empty):
    others = dict.fromkeys((*COULD_MEAN, *ABOUT, "tools", "system", "history", "text"), empty)
    checked = check_records([Record("d.jsonl:1", {**others, **RECORDS[format_name]})])
    assert (checked.data_format.name, checked.ignored_keys) == (format_name, ())


@pytest.mark.parametrize("format_name", RECORDS)
def test_a_format_whose_columns_are_null_is_not_the_records(format_name):
    columns = RECORDS[format_name]
    nulls = {key: None for other in RECORDS.values() for key in other if key not in columns}
    if format_name == "output alone":
        del nulls["instruction"]  # with it, it would be Alpaca's record without an instruction
    checked = check_records([Record("d.jsonl:1", {**nulls, **columns})])
    assert checked.data_format.name == format_name


def test_nesting_too_deep_to_compare_is_one_sentence():
    def turn():
        meta: list = []
        for _ in range(100_000):
            meta = [meta]
        return {**TURNS[0], "meta": meta}

    columns = {"messages": [turn(), TURNS[1]], "prompt": [turn()]}
    with pytest.raises(DataError) as caught:
        check_records([Record("d.jsonl:1", columns)])
    assert str(caught.value) == "d.jsonl:1: lists or objects are nested too deeply"


def test_two_descriptions_of_one_example_are_refused():
    for first in RECORDS.values():
        for second in RECORDS.values():
            if not first.keys() & second.keys():
                with pytest.raises(DataError, match="drop|need"):
                    check_records([Record("d.jsonl:1", {**first, **second})])


def test_an_id_of_training_words_is_an_id():
    assert is_about_the_example("template_id", "x")
    assert not is_about_the_example("train_type", "x")
