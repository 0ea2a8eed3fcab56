"""Reading files: records with their lines, and one sentence for everything that can be wrong."""

import json

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data import sources
from megablocks_utils.training.data.sources import read_records


def read_all(name):
    return list(read_records(name))


RECORDS = [{"output": "a"}, {"output": "b", "n": [1, 2]}, {"output": "Größe 東京"}]


def read(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(record.place.removeprefix(f"{folder}/"), record.columns) for record in
            read_records(str(path))]  # fmt: skip


def test_a_list_keeps_the_line_of_every_record(tmp_path):
    text = (
        '\n[\n {"output": "a"}, {"output": "b",\n  "n": [1, 2]}\n\n,{"output": "Größe 東京"}\n]\n'
    )
    assert read(tmp_path, "d.json", text) == list(
        zip(["d.json:3", "d.json:3", "d.json:6"], RECORDS, strict=True)
    )


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_object_per_line_with_blank_lines(tmp_path, name, newline):
    lines = [json.dumps(RECORDS[0]), "", json.dumps(RECORDS[1]), json.dumps(RECORDS[2]), ""]
    text = "\ufeff" + newline.join(lines)
    assert read(tmp_path, name, text) == list(
        zip([f"{name}:1", f"{name}:3", f"{name}:4"], RECORDS, strict=True)
    )


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"output": "a", "n": [1, 2]}, {"output": "b", "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    records = read_all(str(tmp_path / "d.parquet"))
    assert [r.columns for r in records] == rows
    assert [r.place for r in records] == [f"{tmp_path}/d.parquet, record {n}" for n in (1, 2)]


BAD_CONTENT = [
    ("d.json", "", "--data_path {}/d.json is empty"),
    ("d.jsonl", "\n \n", "--data_path {}/d.jsonl is empty"),
    ("d.parquet", "", "--data_path {}/d.parquet is empty"),
    ("d.json", " [ ] ", "--data_path {}/d.json holds no records"),
    (
        "d.json",
        '[\n{"output": "a"},\n{"output": }]',
        "{}/d.json:3: not valid JSON: Expecting value at column 12",
    ),
    (
        "d.json",
        '[{"output": "a"}\n{"output": "b"}]',
        "{}/d.json:2: not valid JSON: Expecting ',' or ']' at column 1",
    ),
    (
        "d.json",
        '[{"output": "a"},\n',
        "{}/d.json:2: not valid JSON: Expecting value at column 1",
    ),
    (
        "d.json",
        '[{"output": "a"}',
        "{}/d.json:1: not valid JSON: Expecting ',' or ']' at column 17",
    ),
    ("d.json", "[{}]\n{}", "{}/d.json:2: not valid JSON: Extra data at column 1"),
    (
        "d.jsonl",
        '{"output": "a"}\n{"output": "b"',
        "{}/d.jsonl:2: not valid JSON: Expecting ',' delimiter at column 15",
    ),
    ("d.json", '[{},\n"a"]', "{}/d.json:2: a record must be a JSON object, this is a string"),
    ("d.jsonl", "{}\n[1]", "{}/d.jsonl:2: a record must be a JSON object, this is a list"),
    ("d.jsonl", "null", "{}/d.jsonl:1: a record must be a JSON object, this is null"),
    ("d.jsonl", "1.5", "{}/d.jsonl:1: a record must be a JSON object, this is a number"),
    ("d.jsonl", "true", "{}/d.jsonl:1: a record must be a JSON object, this is true or false"),
    (
        "d.json",
        b'{"output": "\xff"}',
        "--data_path {}/d.json is not UTF-8 text: invalid start byte at byte 12",
    ),
    ("d.csv", "a,b", "--data_path {}/d.csv must end in one of .json, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_CONTENT)
def test_a_bad_file_is_named_with_the_line(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, content)
    assert caught.value.as_options() == message.format(tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "d.parquet", "this is no parquet file")
    start = f"--data_path {tmp_path}/d.parquet cannot be read as parquet: "
    assert caught.value.as_options().startswith(start)
    assert "\n" not in caught.value.as_options()


@pytest.mark.parametrize("name", ["missing.json", "/no/such/place", "a/b/c", "./alpaca"])
def test_a_missing_file_is_named(name):
    with pytest.raises(DataError) as caught:
        read_all(name)
    assert caught.value.as_options() == f"--data_path {name} does not exist"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        read_all(str(tmp_path))
    assert caught.value.as_options() == (
        f"--data_path {tmp_path} is a folder, wanted a file (.json, .jsonl, .parquet)"
    )


def test_a_hub_dataset_is_read_from_its_train_split(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"output": "a"}, {"output": "b"}])
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources.socket, "getaddrinfo", lambda host, port: [])
    records = read_all("owner/name")
    assert asked == [("owner/name", "train")]
    assert [(r.place, r.columns) for r in records] == [
        ("owner/name, record 1", {"output": "a"}),
        ("owner/name, record 2", {"output": "b"}),
    ]


@pytest.mark.parametrize("error", [ConnectionError, ValueError, FileNotFoundError])
def test_a_hub_dataset_that_does_not_come_is_named(monkeypatch, error):
    import datasets

    def load_dataset(name, split):
        raise error("no\n  network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources.socket, "getaddrinfo", lambda host, port: [])
    with pytest.raises(DataError) as caught:
        read_all("owner/name")
    assert caught.value.as_options() == (
        "--data_path owner/name is no local file and could not be loaded from the Hub: no network"
    )


def test_a_hub_without_address_is_named_at_once(monkeypatch):
    def getaddrinfo(host, port):
        raise sources.socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(sources.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(sources, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    with pytest.raises(DataError) as caught:
        read_all("owner/name")
    assert caught.value.as_options() == (
        "--data_path owner/name is no local file and the Hub cannot be reached: hub.example has "
        "no address here (HF_HUB_OFFLINE=True uses what has been downloaded before)"
    )
