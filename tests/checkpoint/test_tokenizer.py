"""Tokenizer files that are damaged, foreign or incomplete."""

import json

import pytest

from megablocks_utils.checkpoint.tokenizer import load_tokenizer
from megablocks_utils.errors import CheckpointError
from tests.support.tiny_tokenizer import tiny_tokenizer

BACKEND, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def as_llama_without_its_file(folder):
    (folder / BACKEND).unlink()
    edit(SETTINGS, tokenizer_class="LlamaTokenizer")(folder)


def with_code(folder):
    (folder / "mine.py").write_text("raise SystemExit(9)")
    auto_map = {"AutoTokenizer": ["mine.Mine", None]}
    edit(SETTINGS, auto_map=auto_map, tokenizer_class="Mine")(folder)


UNUSABLE = [
    (write(BACKEND, b""), "tokenizer.json is no JSON file"),
    (write(BACKEND, b"[]"), "tokenizer.json holds no JSON object"),
    (write(BACKEND, b"[" * 200_000), "tokenizer.json is no JSON file"),
    (write(BACKEND, b"\xff\xfe\x00"), "tokenizer.json is no JSON file"),
    (
        write(BACKEND, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "tokenizer.json is a pointer of Git LFS; the file itself was not fetched",
    ),
    (edit(BACKEND, version="9.0"), "Unknown tokenizer version '9.0'"),
    (edit(BACKEND, model={"type": "Newer", "vocab": {}}), "did not match any variant"),
    (edit(BACKEND, pre_tokenizer={"type": "Newer"}), "did not match any variant"),
    (edit(BACKEND, model={"type": "BPE", "vocab": {}, "merges": []}), "no tokens for text"),
    (write(SETTINGS, b"[]"), "tokenizer_config.json holds no JSON object"),
    (edit(SETTINGS, tokenizer_class=3), "AttributeError"),
    (edit(SETTINGS, eos_token=3), "Special token eos_token"),
    (edit(SETTINGS, model_max_length="long"), "TypeError"),
    (write("special_tokens_map.json", b'{"eos_token": 5}'), "Special token eos_token"),
    (write("special_tokens_map.json", b'{"\\ud800": "\\udfff"}'), "surrogates not allowed"),
    (write("added_tokens.json", b"[1]"), "added_tokens.json holds no JSON object"),
    (write("chat_template.jinja", b"\xff\xfe"), "codec can't decode"),
    (without(BACKEND), "Couldn't instantiate the backend tokenizer"),
    (as_llama_without_its_file, "no tokens for text; are all of its files there?"),
    (with_code, "it needs code that came with it, which is never run"),
    (without(BACKEND, SETTINGS), None),
]


@pytest.mark.parametrize(("change", "reason"), UNUSABLE)
def test_files_that_cannot_be_used_are_one_sentence(change, reason, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    change(tmp_path)
    if reason is None:
        assert load_tokenizer(tmp_path) is None
        return
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"the tokenizer in {tmp_path} cannot be used: ")
    assert reason in message and "\n" not in message
