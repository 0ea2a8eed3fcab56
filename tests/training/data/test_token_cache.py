"""Tokens are made once, found again only where nothing that makes them has changed, and small."""

import hashlib
import json
import os
import random
import tracemalloc
from datetime import date

import numpy as np
import pytest

from megablocks_utils.config import DataConfig
from megablocks_utils.errors import DataError
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data import source_tokens, token_cache, token_key
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.token_files import TokenWriter
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

ANSWERS = [{"instruction": f"Say {n}.", "output": f"It is {n} " * (1 + n % 3)} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder / "megablocks_utils"


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def load(data_path, tokenizer=None, max_seq_length=4096):
    config = DataConfig(data_path=(data_path,), max_seq_length=max_seq_length)
    return load_examples(config, tokenizer)


def lists(examples):
    return [(ids.tolist(), labels.tolist()) for ids, labels in examples]


def count_reads(monkeypatch):
    """Count how often records are read, which nothing but tokenizing them needs."""
    reads = []
    read_records = source_tokens.read_records

    def counted(*arguments):
        reads.append(arguments)
        return read_records(*arguments)

    monkeypatch.setattr(source_tokens, "read_records", counted)
    return reads


def random_records(seed, num_records=60):
    """Tokenized records of all kinds: empty, short, long, nothing learned, labels of their own."""
    generator = random.Random(seed)
    for _ in range(num_records):
        ids = [generator.randrange(1000) for _ in range(generator.randrange(14))]
        kind = generator.choice(("all", "none", "answer", "own"))
        start = {"all": 0, "none": len(ids)}.get(kind, generator.randrange(len(ids) + 1))
        labels = [-100] * start + ids[start:]
        if kind == "own" and seed % 2:
            labels = [generator.choice((-100, generator.randrange(2000))) for _ in ids]
        yield {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("seed", range(6))
def test_cutting_dropping_and_checksum_are_those_of_plain_lists(seed, tmp_path):
    records = list(random_records(seed))
    path = write(tmp_path / "d.jsonl", records)
    for limit in (7, 4, 10**20):
        wanted = []
        for record in records:
            ids, labels = record["input_ids"][:limit], record["labels"][:limit]
            if any(label != -100 for label in labels[1:]):
                wanted.append((ids, [-100, *labels[1:]]))
        for _ in range(2):
            examples = load(path, max_seq_length=limit)
            assert lists(examples) == wanted
            assert examples.lengths.tolist() == [len(ids) for ids, _ in wanted]
            counts = [sum(label != -100 for label in labels) for _, labels in wanted]
            assert examples.num_label_tokens.tolist() == counts
            assert examples.num_cut == sum(len(record["input_ids"]) > limit for record in records)
            assert examples.num_dropped == len(records) - len(wanted)
            assert examples.checksum() == checksum_of(wanted)
            largest = max(max(ids + labels) for ids, labels in wanted)
            examples.check_vocabulary(largest + 1)
            with pytest.raises(DataError, match=f"token {largest},"):
                examples.check_vocabulary(largest)


def checksum_of(encoded):
    """The checksum that manifests of checkpoints hold since their first version."""
    parts = [[len(ids) for ids, _ in encoded], *zip(*encoded, strict=True)]
    flat = [parts[0], sum(parts[1], []), sum(parts[2], [])]
    return hashlib.sha256(b"".join(np.array(part, "<i8").tobytes() for part in flat)).hexdigest()


def test_the_second_load_reads_no_record(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    first = load(path, tiny_tokenizer())
    reads = count_reads(monkeypatch)
    os.utime(path, (1, 1))
    copy = write(tmp_path / "copy.jsonl", ANSWERS)
    for again in (load(path, tiny_tokenizer()), load(copy, tiny_tokenizer())):
        assert lists(again) == lists(first)
        assert (again.checksum(), again.format_name) == (first.checksum(), first.format_name)
    limit = max(first.lengths) - 1
    shorter = load(path, tiny_tokenizer(), max_seq_length=limit)
    assert shorter.num_cut > 0 and max(shorter.lengths) == limit
    assert not reads


def test_whatever_makes_tokens_makes_new_ones(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": turns}]
    path = write(tmp_path / "d.jsonl", chats)
    reads = count_reads(monkeypatch)

    def is_read_again(tokenizer, data_path=path):
        before = len(reads)
        load(data_path, tokenizer)
        load(data_path, tokenizer)
        assert len(reads) <= before + 2
        return len(reads) > before

    assert is_read_again(tiny_tokenizer())
    assert is_read_again(tiny_tokenizer(chat_template="!" + CHATML))
    assert is_read_again(tiny_tokenizer(adds_bos=True))
    added = tiny_tokenizer()
    added.add_tokens(["abc"])
    assert is_read_again(added)
    other_end = tiny_tokenizer()
    other_end.eos_token = "<s>"
    assert is_read_again(other_end)
    assert is_read_again(tiny_tokenizer(), write(tmp_path / "e.jsonl", [*chats, *chats]))
    assert not is_read_again(tiny_tokenizer())
    monkeypatch.setattr(token_key, "version", lambda name: "0.0")
    assert is_read_again(tiny_tokenizer())
    monkeypatch.setattr(token_key, "_digest_code", lambda: "other code")
    assert is_read_again(tiny_tokenizer())


def test_a_template_is_told_the_day_that_is_given(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = DataConfig(
        data_path=(write(tmp_path / "d.jsonl", [{"messages": turns}]),), max_seq_length=4096
    )
    template = "{% if strftime_now is defined %}{{ strftime_now( '%d.%m.%Y %H:%M') }}{% endif %}"
    dated = tiny_tokenizer(chat_template=template + '{{ strftime_now("") }}' + CHATML)
    reads = count_reads(monkeypatch)
    for today in (date(2021, 3, 4), date(2026, 11, 30), date(2021, 3, 4)):
        examples = load_examples(config, dated, today=today)
        text = dated.decode(examples[0][0])
        assert text.startswith(f"{today:%d.%m.%Y} 00:00<|user|>")
        assert examples.template_date == today.isoformat()
    assert len(reads) == 4  # two days, each read to check it and to tokenize it
    for today in (date(2021, 3, 4), date(2026, 11, 30)):
        assert load_examples(config, tiny_tokenizer(), today=today).template_date is None
    assert len(reads) == 6


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "empty", "text"])
def test_damaged_files_are_made_again(tmp_path, cache, damage):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    wanted = lists(load(path, tiny_tokenizer()))
    names = sorted(file.name for file in cache.glob("*/*"))
    assert len(names) == 5
    for name in names:
        (file,) = cache.glob(f"*/{name}")
        content = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            middle = len(content) // 2
            altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            damaged = {"truncated": content[:-2], "altered": altered, "empty": b""}
            file.write_bytes(damaged.get(damage, b"{}"))
        assert lists(load(path, tiny_tokenizer())) == wanted
        (file,) = cache.glob(f"*/{name}")
        assert len(file.read_bytes()) == len(content)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_a_sentence(tmp_path, cache):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    wanted = lists(load(path, tiny_tokenizer()))
    cache.parent.rename(tmp_path / "elsewhere")
    cache.parent.write_text("a file")
    before = sorted(tmp_path.iterdir())
    examples = load(path, tiny_tokenizer())
    assert lists(examples) == wanted
    assert examples.notes == (
        f"{cache} cannot be written (Not a directory): tokens are kept for this run only; "
        "HF_DATASETS_CACHE names another place",
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_costs_a_sentence_and_leaves_nothing(tmp_path, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "d.jsonl", ANSWERS)
    monkeypatch.setattr(TokenWriter, "append", full)
    with pytest.raises(DataError) as caught:
        load(path, tiny_tokenizer())
    assert str(caught.value) == (
        f"{cache} cannot be written (No space left on device), and the temporary folder cannot be "
        "written (No space left on device); the tokens of the data need room: HF_DATASETS_CACHE or "
        "TMPDIR name another place"
    )
    assert sorted(file.name for file in tmp_path.rglob("*")) == [
        "cache", "d.jsonl", "megablocks_utils",
    ]  # fmt: skip


def test_two_that_make_the_same_tokens_do_not_meet(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    finish = TokenWriter.finish

    def overtaken(writer, facts):
        finish(writer, facts)
        monkeypatch.setattr(TokenWriter, "finish", finish)
        load(path, tiny_tokenizer())

    monkeypatch.setattr(TokenWriter, "finish", overtaken)
    examples = load(path, tiny_tokenizer())
    assert not examples.notes and len(examples) == 40
    assert len(list(cache.iterdir())) == 1


def test_data_that_changes_while_it_is_read_is_refused(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    read_records = source_tokens.read_records

    def changing(*arguments):
        yield from read_records(*arguments)
        write(tmp_path / "d.jsonl", ANSWERS[1:])

    monkeypatch.setattr(source_tokens, "read_records", changing)
    with pytest.raises(DataError) as caught:
        load(path, tiny_tokenizer())
    assert caught.value.as_options() == (
        f"--data_path {path} was changed while it was read; start again when it is complete"
    )
    assert not list(cache.iterdir())


def test_a_token_costs_less_than_eight_bytes(tmp_path, cache):
    records = [{"input_ids": [3] * 50, "labels": [-100] * 20 + [3] * 30}] * 4000
    path = write(tmp_path / "d.jsonl", records)
    load(path)
    num_tokens = 50 * len(records)
    assert sum(file.stat().st_size for file in cache.glob("*/*")) < 6 * num_tokens
    tracemalloc.start()
    examples = load(path)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) == 4000
    assert held < num_tokens and most < 4 * num_tokens


def test_the_first_rank_of_a_machine_tokenizes_for_all(ranks2, tmp_path, cache):
    path = write(tmp_path / "d.jsonl", ANSWERS)
    answers = ranks2.run(_load_on_a_rank, path, str(cache.parent))
    assert [reads for reads, _ in answers] == [2, 0]  # to check all, and to tokenize
    assert answers[0][1] == answers[1][1] == load(path, tiny_tokenizer()).checksum()
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    answers = ranks2.run(_load_on_a_rank, path, str(blocked))
    assert [reads for reads, _ in answers] == [2, 0]
    bad = write(tmp_path / "bad.jsonl", [*ANSWERS, {"instruction": "a"}])
    answers = ranks2.run(_load_on_a_rank, bad, str(cache.parent))
    sentence = f"{bad}:41: no column output, but the first record has instruction and output"
    assert [message for _, message in answers] == [sentence] * 2


def _load_on_a_rank(rank, path, cache):
    os.environ["HF_DATASETS_CACHE"] = cache
    reads = []
    read_records = source_tokens.read_records
    source_tokens.read_records = lambda *a: reads.append(a) or read_records(*a)
    config = DataConfig(data_path=(path,), max_seq_length=4096)
    try:
        launch = LaunchEnvironment(rank=rank, local_rank=rank, world_size=2)
        examples = load_examples(config, tiny_tokenizer(), launch)
        checked = [len(ids) for ids, _ in examples]
        assert checked == examples.lengths.tolist()
        return len(reads), examples.checksum()
    except DataError as error:
        return len(reads), str(error)
    finally:
        source_tokens.read_records = read_records


def test_the_cache_is_beside_that_of_datasets(monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    wanted = "/home/somebody/.cache/huggingface/datasets/megablocks_utils"
    assert str(token_cache.cache_folder()) == wanted
    monkeypatch.setenv("HF_HOME", "/x/hf")
    assert str(token_cache.cache_folder()) == "/x/hf/datasets/megablocks_utils"
