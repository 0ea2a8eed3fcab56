"""Cutting, dropping and counting, and files of all formats from disk to tokens."""

import json
from pathlib import Path

import pytest

from megablocks_utils.config import DataConfig
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.examples import load_examples
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tokenized import examples_of

DATA = Path(__file__).parents[3] / "data"


def load(folder, records, *, max_seq_length=4096, tokenizer=None):
    path = folder / "d.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    config = DataConfig(data_path=(str(path),), max_seq_length=max_seq_length)
    return load_examples(config, tokenizer)


def tokens(num_prompt, num_answer, first=10):
    ids = list(range(first, first + num_prompt + num_answer))
    return {"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]}


def test_examples_are_held_in_file_order_with_their_counts(tmp_path):
    examples = load(tmp_path, [tokens(2, 3), tokens(1, 1, first=50), tokens(0, 4, first=70)])
    assert len(examples) == 3
    assert examples[1][0].tolist() == [50, 51]
    assert examples[1][1].tolist() == [-100, 51]
    assert examples.lengths.tolist() == [5, 2, 4]
    assert examples.num_label_tokens.tolist() == [3, 1, 3]
    assert (examples.num_cut, examples.num_dropped) == (0, 0)
    assert examples.format_name == "input_ids and labels"


def test_tokens_are_used_as_they_are_without_a_tokenizer(tmp_path):
    examples = load(tmp_path, [{"input_ids": [5, 6, 7], "labels": [-100, 9, 7]}])
    assert [[part.tolist() for part in example] for example in examples] == [
        [[5, 6, 7], [-100, 9, 7]]
    ]


def test_the_first_token_is_never_learned(tmp_path):
    examples = load(tmp_path, [tokens(0, 3)])
    assert examples[0][1].tolist() == [-100, 11, 12]


def test_long_examples_are_cut_and_those_without_label_dropped(tmp_path):
    records = [
        tokens(2, 3),
        tokens(4, 2),
        tokens(3, 1),
        tokens(0, 1),
        {"input_ids": [], "labels": []},
    ]
    examples = load(tmp_path, records, max_seq_length=4)
    assert [ids.tolist() for ids, _ in examples] == [[10, 11, 12, 13], [10, 11, 12, 13]]
    assert [labels.tolist() for _, labels in examples] == [
        [-100, -100, 12, 13],
        [-100, -100, -100, 13],
    ]
    assert (examples.num_cut, examples.num_dropped) == (2, 3)


def test_nothing_left_to_learn_is_an_error(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, [tokens(4, 2), tokens(5, 1), tokens(0, 1)], max_seq_length=4)
    assert caught.value.as_options() == (
        f"--data_path {tmp_path}/d.jsonl leaves nothing to learn: none of its 3 examples has a "
        "label within --max_seq_length 4 tokens"
    )


def test_a_record_of_another_format_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, [{"instruction": "a", "output": "b"}, {"output": "### Response: b"}])
    assert caught.value.as_options() == (
        f"{tmp_path}/d.jsonl:2: no column instruction, but the first record has instruction and "
        "output"
    )


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, [{"instruction": "a", "output": "b"}])
    assert caught.value.as_options() == (
        f"--data_path {tmp_path}/d.jsonl holds text (instruction and output), but the model has "
        "no tokenizer"
    )


def test_more_records_than_one_tokenizer_batch(tmp_path):
    records = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(131)]
    tokenizer = tiny_tokenizer()
    examples = load(tmp_path, records, tokenizer=tokenizer)
    answers = [tokenizer.decode(labels[labels != -100]) for _, labels in examples]
    assert answers == [f"{n}</s>" for n in range(131)]


def test_tokens_outside_the_vocabulary_are_refused():
    examples = examples_of([([3, 9, 4], [-100, 9, 11])])
    examples.check_vocabulary(12)
    with pytest.raises(DataError) as caught:
        examples.check_vocabulary(11)
    assert caught.value.as_options() == (
        "the data holds token 11, but the model's vocabulary has 11 tokens (0 to 10)"
    )


SAMPLES = [
    ("alpaca_sample.json", "instruction and output", 36),
    ("samples/messages.jsonl", "messages", 4),
    ("samples/conversations.jsonl", "conversations", 3),
    ("samples/prompt_completion.jsonl", "prompt and completion", 2),
    ("samples/finished_text.jsonl", "output alone", 4),
    ("samples/tokenized.jsonl", "input_ids and labels", 3),
]


@pytest.mark.parametrize(("name", "format_name", "count"), SAMPLES)
def test_the_samples_of_the_repository_load(name, format_name, count):
    config = DataConfig(data_path=(str(DATA / name),), max_seq_length=4096)
    examples = load_examples(config, tiny_tokenizer())
    assert (examples.format_name, len(examples)) == (format_name, count)
    assert (examples.num_cut, examples.num_dropped) == (0, 0)
