"""Training data: files of every kind, lines of JSON, and the keys of records."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation
from tests.fuzz.mutate import DEEP, SPECIAL_FILES, byte_mutations, put_in_place, write_text

__all__ = ["data_cases"]

NUM_RANDOM = 60
GOOD = json.dumps({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}).encode()
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}

LINES: dict[str, tuple[bytes, Expected]] = {
    "empty": (b"", "refused"),
    "blank": (b"\n \n", "refused"),
    "no JSON": (b"x", "refused"),
    "a list": (b"[]", "refused"),
    "no keys": (b"{}", "refused"),
    "text": (b'"x"', "refused"),
    "a number": (b"1", "refused"),
    "null": (b"null", "refused"),
    "ids as text": (b'{"input_ids":"1","labels":[1]}', "refused"),
    "ids as floats": (b'{"input_ids":[1.0],"labels":[1]}', "refused"),
    "ids true": (b'{"input_ids":[true,1],"labels":[1,1]}', "refused"),
    "ids below 0": (b'{"input_ids":[-1,1],"labels":[1,1]}', "refused"),
    "ids too large": (b'{"input_ids":[1,99999],"labels":[1,1]}', "refused"),
    "ids of 2^63": (b'{"input_ids":[1,9223372036854775808],"labels":[1,1]}', "refused"),
    "ids of 1e400": (b'{"input_ids":[1,1e400],"labels":[1,1]}', "refused"),
    "ids null": (b'{"input_ids":null,"labels":null}', "refused"),
    "ids nested": (b'{"input_ids":[[1]],"labels":[[1]]}', "refused"),
    "labels too large": (b'{"input_ids":[1,2],"labels":[1,99999]}', "refused"),
    "labels of 10^20": (b'{"input_ids":[1,2],"labels":[1,99999999999999999999]}', "refused"),
    "labels -1": (b'{"input_ids":[1,2],"labels":[1,-1]}', "refused"),
    "labels too few": (b'{"input_ids":[1,2],"labels":[1]}', "refused"),
    "nothing learned": (b'{"input_ids":[1,2],"labels":[-100,-100]}', "refused"),
    "one token": (b'{"input_ids":[1],"labels":[1]}', "refused"),
    "no token": (b'{"input_ids":[],"labels":[]}', "refused"),
    "half a pair": (b'{"instruction":"\\ud800","output":"x"}', "refused"),
    "NUL": (b'{"instruction":"a\\u0000b","output":"x"}', "any"),
    "latin-1": (b'{"instruction":"\xff","output":"x"}', "refused"),
    "UTF-16": ('{"instruction":"a","output":"x"}'.encode("utf-16"), "refused"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "any"),
    "deep lists": (b"[" * DEEP, "refused"),
    "deep objects": (b'{"a":' * DEEP, "refused"),
    "a deep value": (
        b'{"input_ids":[1,2],"labels":[1,2],"id":' + b"[" * 900 + b"]" * 900 + b"}",
        "any",
    ),
    "a key twice": (b'{"input_ids":[1,2],"labels":[1,2],"labels":[1,3]}', "refused"),
    "NaN": (b'{"input_ids":[1,NaN],"labels":[1,2]}', "refused"),
    "a long number": (b'{"input_ids":[1,' + b"9" * 5000 + b'],"labels":[1,2]}', "refused"),
    "carriage returns": (GOOD + b"\r" + GOOD, "refused"),
    "both": (GOOD + b"\r\n" + GOOD, "any"),
    "line separators": (b'{"instruction":"a\xe2\x80\xa8b","output":"x"}', "any"),
    "instruction a number": (b'{"instruction":1,"output":"x"}', "refused"),
    "instruction a list": (b'{"instruction":["a"],"output":"x"}', "refused"),
    "no answer": (b'{"instruction":"a","output":""}', "any"),
    "input a number": (b'{"instruction":"a","input":3,"output":"x"}', "refused"),
    "a text without its marker": (b'{"output":"x"}', "refused"),
    "two formats": (GOOD + b'\n{"instruction":"a","output":"b"}', "refused"),
    "a bad second": (GOOD + b'\n{"input_ids":[1],"labels":["x"]}', "refused"),
    "a long line": (b'{"instruction":"' + b"t1 " * 300_000 + b'","output":"t2"}', "any"),
    "a last comma": (b'{"input_ids":[1,2],"labels":[1,2],}', "refused"),
    "gzip": (b"\x1f\x8b\x08\0\0\0", "refused"),
    "braces": (b'{"instruction":"{0} {x.__class__}","output":"t1 t2"}', "any"),
    "comments": (b"// x\n" + GOOD, "refused"),
}
KEYS: dict[str, tuple[Any, Expected]] = {
    "weight 0": (0, "any"),
    "train": (False, "any"),
    "weight": (0.5, "refused"),
    "tools": ([{"type": "function"}], "any"),
    "attention_mask": ([1, 1, 1], "refused"),
    "labels": ([1], "refused"),
    "history": ([["a", "b"]], "any"),
    "system": ("Be kind.", "any"),
    "images": (["x"], "refused"),
    "chosen": ("x", "refused"),
    "completion": ("x", "refused"),
    "zzz": (1, "refused"),
    "loss_mask": ([0], "refused"),
}
MESSAGES: dict[str, tuple[Any, Expected]] = {
    "empty": ([], "refused"),
    "text": ("x", "refused"),
    "null": (None, "refused"),
    "of lists": ([[1]], "refused"),
    "no content": ([{"role": "user"}], "refused"),
    "content null": ([USER, {"role": "assistant", "content": None}], "refused"),
    "content a number": ([USER, {"role": "assistant", "content": 3}], "refused"),
    "content parts": ([USER, ASSISTANT | {"content": [{"type": "text", "text": "So."}]}], "any"),
    "an image": ([USER, ASSISTANT | {"content": [{"type": "image"}]}], "refused"),
    "role a number": ([USER, ASSISTANT | {"role": 3}], "refused"),
    "role unknown": ([USER | {"role": "zzz"}, ASSISTANT], "any"),
    "no assistant": ([USER], "refused"),
    "weight 0": ([USER, ASSISTANT, USER, ASSISTANT | {"weight": 0}], "any"),
    "weight of text": ([USER, ASSISTANT | {"weight": "x"}], "refused"),
    "weight 2": ([USER, ASSISTANT | {"weight": 2}], "refused"),
    "train of text": ([USER, ASSISTANT | {"train": "false"}], "refused"),
    "nothing trained": ([USER, ASSISTANT | {"train": False}], "refused"),
    "unknown key": ([USER, ASSISTANT | {"zzz": 1}], "refused"),
    "calls of text": ([USER, ASSISTANT | {"tool_calls": "x"}], "refused"),
    "calls of numbers": ([USER, ASSISTANT | {"tool_calls": [1]}], "refused"),
    "calls without function": ([USER, ASSISTANT | {"tool_calls": [{}]}], "refused"),
    "a lone surrogate": ([USER, ASSISTANT | {"content": "\ud800"}], "refused"),
}


def data_cases(generator: Random) -> Iterator[Case]:
    """Yield unreadable files, bad lines, keys that mean something, and random bytes."""

    def case(name: str, content: bytes, expected: Expected, base: str = "train") -> Case:
        if base == "train":
            base = generator.choice(("train", "evaluate"))
        mutations = {"tokens" if base in ("train", "evaluate") else base: write_text(content)}
        return Case("data", name, base, mutations=mutations, expected=expected)

    yield from (case(name, content, expected) for name, (content, expected) in LINES.items())
    for name, (value, expected) in KEYS.items():
        record = json.loads(GOOD) | {name.split()[0]: value}
        yield case(f"tokens with {name}", json.dumps(record).encode(), _for_tokens(name, expected))
        record = {"instruction": "Say it.", "output": "It."} | {name.split()[0]: value}
        yield case(f"alpaca with {name}", json.dumps(record).encode(), _for_text(name), "alpaca")
        chat = {"messages": [USER, ASSISTANT]} | {name.split()[0]: value}
        yield case(f"chat with {name}", json.dumps(chat).encode(), _for_text(name), "chat")
    for name, (messages, expected) in MESSAGES.items():
        content = json.dumps({"messages": messages}).encode()
        yield case(f"messages {name}", content, expected, "chat")
    for name, content in {
        "cut": b"[" + GOOD,
        "empty": b"[]",
        "more": b"[" + GOOD + b"] x",
        "comma": b"[" + GOOD + b",]",
        "deep": b"[[" * DEEP,
        "an object": b'{"data":[]}',
        "mixed": b"[" + GOOD + b",1]",
    }.items():
        yield _file_case(f"list: {name}", "d.json", write_text(content), "refused")
    yield _file_case("list: good", "d.json", write_text(b"[" + GOOD + b"]"), "any")
    for name, content in {
        "empty": b"",
        "noise": b"PAR1" + bytes(200) + b"PAR1",
        "text": b"x",
    }.items():
        yield _file_case(f"parquet: {name}", "d.parquet", write_text(content), "refused")
    for name, (columns, expected) in _tables().items():
        yield _file_case(f"parquet: {name}", "d.parquet", _write_table(columns), expected)
    for suffix in ("csv", "txt", "jsonl.gz", "arrow", ""):
        yield _file_case(f"suffix .{suffix}", f"d.{suffix}", write_text(GOOD), "refused")
    for name, special in SPECIAL_FILES.items():
        yield Case("data", f"file: {name}", "train", expected="refused",
                   mutations={"tokens": put_in_place(special)})  # fmt: skip
    for base, content in (
        ("train", GOOD),
        ("chat", json.dumps({"messages": [USER, ASSISTANT]}).encode()),
    ):
        for name, changed in byte_mutations(content, generator, NUM_RANDOM // 2):
            yield case(f"{base} bytes {name}", changed, "any", base)


def _for_tokens(name: str, expected: Expected) -> Expected:
    return "any" if name in ("weight 0", "train", "labels") else expected


def _for_text(name: str) -> Expected:
    return "refused" if name in ("images", "chosen", "zzz") else "any"


def _file_case(name: str, file_name: str, mutation: Mutation, expected: Expected) -> Case:
    def apply(tokens: Path) -> None:
        mutation(tokens.parent / file_name)

    return Case(
        "data",
        name,
        "train",
        words=("--data_path", f"{{inputs}}/{file_name}"),
        mutations={"tokens": apply},
        expected=expected,
    )


def _tables() -> dict[str, tuple[dict[str, Any], Expected]]:
    return {
        "good": ({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}, "any"),
        "nulls": ({"input_ids": [None], "labels": [None]}, "refused"),
        "floats": ({"input_ids": [[1.5]], "labels": [[1.5]]}, "refused"),
        "bytes": ({"instruction": [b"a"], "output": [b"b"]}, "refused"),
        "other columns": ({"a": [1]}, "refused"),
    }


def _write_table(columns: dict[str, Any]) -> Mutation:
    def apply(path: Path) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table(columns), path)

    return apply
