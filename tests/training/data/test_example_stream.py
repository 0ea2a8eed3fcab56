"""Data read while it is trained on: the steps of data that is all there, from any position."""

import json
from datetime import date

import numpy as np
import pytest

from megablocks_utils.config import DataConfig, OptimConfig, RunConfig
from megablocks_utils.errors import DataError
from megablocks_utils.training.data import stream_records
from megablocks_utils.training.data.example_order import draw_mixture
from megablocks_utils.training.data.example_stream import (
    ExampleStream,
    StreamPosition,
    StreamReader,
)
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.data.source_tokens import Tokenizing
from megablocks_utils.training.data.sources import DatasetPart
from megablocks_utils.training.data.streamed_schedule import StreamedSchedule
from megablocks_utils.training.data.training_templates import choose_chat_template
from tests.support.tiny_tokenizer import tiny_tokenizer

TODAY = date(2026, 12, 1)
LIMIT = 120


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Texts and tokens; some records are cut, some have nothing to learn."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = [f"It is {n}. " * (1 + n % 7) for n in range(90)]
    texts = [{"instruction": f"Say {n}.", "output": answer} for n, answer in enumerate(answers)]
    ids = [[3 + n % 90] * (2 + n) for n in range(150)]
    tokens = [
        {"input_ids": row, "labels": row if n % 5 else [-100] * len(row)}
        for n, row in enumerate(ids)
    ]
    paths = []
    for name, records in (("texts", texts), ("tokens", tokens)):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        with open(paths[-1], "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return tuple(paths)


def open_stream(data, vocab_size=10**6):
    tokenizer = tiny_tokenizer()
    how = Tokenizing(tokenizer, TODAY, data.max_seq_length, DatasetPart(is_streamed=True))
    return ExampleStream(data, 5, how, choose_chat_template(None, tokenizer), vocab_size)


def run_config(data, **optim):
    return RunConfig(data=data, seed=5, optim=OptimConfig(max_steps=40, **optim))


def steps_of(schedule):
    """Each step's tokens on a rank, micro-batch by micro-batch, and its sums over all ranks."""
    for _, plan in schedule.plans():
        rows = [batch.input_ids.tolist() for batch in plan.micro_batches]
        labels = [batch.labels.tolist() for batch in plan.micro_batches]
        yield rows, labels, plan.num_label_tokens, plan.num_input_tokens


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_are_those_of_data_that_is_all_there(sources, world_size):
    data = DataConfig(sources, max_seq_length=LIMIT, shuffle=False)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    config = run_config(data, **sizes)
    examples = load_examples(data, tiny_tokenizer())
    for rank in range(world_size):
        reader = StreamReader(open_stream(data), 8 * world_size, 0, StreamPosition())
        streamed = StreamedSchedule(config, examples, rank, world_size, reader=reader)
        assert list(steps_of(streamed)) == list(
            steps_of(Schedule(config, examples, rank, world_size))
        )
        per_epoch = Schedule(config, examples, 0, world_size).steps_per_epoch
        assert streamed.epoch_after(40) == 40 // per_epoch


ORDERS = {
    "in the order of the files": {"shuffle": False},
    "shuffled in blocks": {"shuffle_buffer_size": 50},
    "shuffled in blocks of an odd size": {"shuffle_buffer_size": 7},
    "in shares": {"data_weights": (1.0, 3.0), "shuffle_buffer_size": 50},
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_stream_continues_from_any_of_its_positions(sources, order, monkeypatch):
    data = DataConfig(sources, max_seq_length=LIMIT, **order)
    whole = open_stream(data).batches(16, StreamPosition())
    batches = [next(whole) for _ in range(32)]
    assert {position.epoch for _, position in batches} >= {0, 1, 2}
    checksums = [batch.checksum() for batch, _ in batches]
    assert len(set(checksums)) > 28 or not data.shuffle
    for step in (1, 5, 12, 13, 14, 26):
        rest = open_stream(data).batches(16, StreamPosition(**batches[step - 1][1].as_record()))
        assert [next(rest)[0].checksum() for _ in range(4)] == checksums[step : step + 4]


def test_what_is_done_is_not_tokenized_again(sources, monkeypatch):
    data = DataConfig(sources[:1], shuffle_buffer_size=10)
    stream = open_stream(data)
    tokenized = []
    encode = ExampleStream._encode
    monkeypatch.setattr(
        ExampleStream, "_encode", lambda s, r: tokenized.append(len(r)) or encode(s, r)
    )
    next(stream.batches(4, StreamPosition(records=80)))
    assert sum(tokenized) == 10


def test_records_are_merged_as_examples_are_drawn():
    counts, weights = (40, 90, 15), (0.3, 0.5, 0.2)
    starts = np.cumsum([0, *counts])
    iterators = [iter(range(*pair)) for pair in zip(starts[:-1], starts[1:], strict=True)]
    merged = stream_records.merge_in_shares(iterators, weights, seed=4)
    assert list(merged) == draw_mixture(counts, weights, seed=4).tolist()


def test_a_bad_record_far_down_is_named_when_its_turn_comes(sources):
    with open(sources[0], "a") as file:
        file.write('{"instruction": "a"}\n')
    batches = open_stream(DataConfig(sources[:1], shuffle=False)).batches(16, StreamPosition())
    with pytest.raises(DataError) as caught:
        for _ in range(8):
            next(batches)
    assert str(caught.value) == (
        f"{sources[0]}:91: no column output, but the first record has instruction and output"
    )
    tokens = open_stream(DataConfig(sources[1:], shuffle=False), vocab_size=50)
    with pytest.raises(DataError, match="the data holds token"):
        list(zip(range(9), tokens.batches(16, StreamPosition()), strict=False))
