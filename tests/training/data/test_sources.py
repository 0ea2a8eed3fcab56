"""Reading files: records with their lines, and one sentence for everything that can be wrong."""

import io
import json
import os
import socket

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data import sources
from megablocks_utils.training.data.sources import DatasetPart, check_part, read_records


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


def test_a_json_file_may_be_one_object(tmp_path):
    text = '\n{\n "output": "a"\n}\n'
    assert read(tmp_path, "d.json", text) == [("d.json:2", {"output": "a"})]


def write_parquet(folder, columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "d[1]*.parquet")
    return [record.columns for record in read_records(str(folder / "d[1]*.parquet"))]


def test_parquet_types_become_what_json_has(tmp_path):
    import pyarrow

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": ["x"]}]
    columns = {
        "text": pyarrow.array(["a", None]).dictionary_encode(),
        "large": pyarrow.array(["a", "b"], pyarrow.large_string()),
        "ids": pyarrow.array([[1, 2], [3]], pyarrow.large_list(pyarrow.int32())),
        "messages": [turns, []],
        "map": pyarrow.array([{"a": 1}, {}], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    padded = [{"role": "user", "content": "Hi", "tool_calls": None}]
    padded += [{"role": "assistant", "content": None, "tool_calls": ["x"]}]
    assert write_parquet(tmp_path, columns) == [
        {"text": "a", "large": "a", "ids": [1, 2], "messages": padded, "map": {"a": 1}},
        {"text": None, "large": "b", "ids": [3], "messages": [], "map": {}},
    ]


def test_parquet_of_datasets_needs_no_decoder_and_decodes_its_json(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "calls": datasets.List(datasets.Json()),
        }
    )
    media = {"bytes": b"no image", "path": None}
    rows = [{"image": media, "calls": [{"a": None}, {"b": [1]}]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
    assert [record.columns for record in read_records(str(tmp_path / "d.parquet"))] == rows


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
        "d.jsonl",
        '{"a": 1, "b": {"c": 1, "c": 2}}',
        "{}/d.jsonl:1: the key 'c' is given twice in one object",
    ),
    ("d.json", '[{"a": 1},\n{"a": NaN}]', "{}/d.json:2: NaN is not a JSON number"),
    ("d.jsonl", '{"a": 1}\n{"a": -Infinity}', "{}/d.jsonl:2: -Infinity is not a JSON number"),
    (
        "d.json",
        '[{},\n{"a": ' + "1" * 5000 + "}]",
        "{}/d.json:2: holds a whole number with more digits than can be read",
    ),
    (
        "d.jsonl",
        '{"a": ' + "1" * 5000 + "}",
        "{}/d.jsonl:1: holds a whole number with more digits than can be read",
    ),
    ("d.json", "[" * 100_000, "{}/d.json:1: lists or objects are nested too deeply to be read"),
    (
        "d.jsonl",
        '{"a": ' * 100_000,
        "{}/d.jsonl:1: lists or objects are nested too deeply to be read",
    ),
    (
        "d.jsonl",
        '{"a": "\0"}',
        "{}/d.jsonl:1: not valid JSON: Invalid control character at column 8",
    ),
    (
        "d.json",
        '{\n "data": [\n{"a": }]}',
        "{}/d.json:3: not valid JSON: Expecting value at column 7",
    ),
    ("d.json", '{"a": 1}\n{"a": 2}{}', "{}/d.json:2: not valid JSON: Extra data at column 9"),
    (
        "d.jsonl.gz",
        b"\x1f\x8b",
        "--data_path {}/d.jsonl.gz is compressed (.gz), wanted the file "
        "unpacked: .json, .jsonl, .parquet",
    ),
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


def truncated_parquet():
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"output": ["abc"] * 50}), file)
    return file.getvalue()[:40] + bytes(20) + file.getvalue()[60:]


@pytest.mark.parametrize("content", [b"this is no parquet file", truncated_parquet()])
def test_a_broken_parquet_file_is_named(tmp_path, content):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "d.parquet", content)
    start = f"--data_path {tmp_path}/d.parquet cannot be read as parquet: "
    assert caught.value.as_options().startswith(start)
    assert "\n" not in caught.value.as_options()


def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    monkeypatch.delattr("pathlib.Path.read_bytes")  # a FIFO without a writer would never end
    os.mkfifo("fifo.jsonl")
    (tmp_path / "link.json").symlink_to("fifo.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.json")
        kinds = {"fifo.jsonl": "a FIFO", "link.json": "a FIFO", "socket.json": "a socket"}
        for name, kind in (kinds | {"/dev/null": "a device"}).items():
            with pytest.raises(DataError) as caught:
                read_all(name)
            assert caught.value.as_options() == (
                f"--data_path {name} is {kind}, wanted a file (.json, .jsonl, .parquet)"
            )


def test_a_name_that_no_folder_can_hold_is_named():
    with pytest.raises(DataError) as caught:
        read_all("a" * 300 + ".json")
    assert caught.value.as_options().endswith(" cannot be read: File name too long")


@pytest.mark.parametrize("name", ["missing.json", "/no/such/place", "a/b/c", "./alpaca"])
def test_a_missing_file_is_named(name):
    with pytest.raises(DataError) as caught:
        read_all(name)
    assert caught.value.as_options() == f"--data_path {name} does not exist"


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        read_all(str(tmp_path))
    assert caught.value.as_options().startswith(
        f"--data_path {tmp_path} is a folder, wanted a file (.json, .jsonl, .parquet) or what "
        "datasets can load: "
    )


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    """A dataset as the Hub has them: two configurations, one with a second split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    files = {"train": "a-train", "test": "a-test"}
    configs = [{"config_name": "a", "data_files": [_split(*item) for item in files.items()]}]
    configs += [{"config_name": "b", "data_files": [_split("train", "b-train")]}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for name in ("a-train", "a-test", "b-train"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"output": f"{name} {n}"}) + "\n" for n in range(1, 4))
        )
    return folder


def _split(split, name):
    return {"split": split, "path": f"{name}.jsonl"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_configuration_and_split_of_a_dataset(dataset_folder, is_streamed):
    def read_part(config, split):
        part = DatasetPart(config, split, is_streamed)
        return [r.columns["output"] for r in read_records(str(dataset_folder), part)]

    assert read_part("a", "test") == ["a-test 1", "a-test 2", "a-test 3"]
    assert read_part("b", "train") == ["b-train 1", "b-train 2", "b-train 3"]
    for wrong, config, split in (("none", "none", "train"), ("dev", "a", "dev")):
        with pytest.raises(DataError) as caught:
            read_part(config, split)
        sentence = caught.value.as_options()
        assert f"(--dataset_config {config}, --dataset_split {split}): " in sentence
        assert wrong in sentence.partition(": ")[2] and "\n" not in sentence


def test_a_file_has_no_split(tmp_path):
    path = str(tmp_path / "d.json")
    check_part([path], DatasetPart())
    check_part([path, "owner/name"], DatasetPart(split="test"))
    with pytest.raises(DataError) as caught:
        check_part([path], DatasetPart(split="test"))
    assert caught.value.as_options() == (
        f"--dataset_split is test, but --data_path {path} is a file, which has none: leave it out"
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
