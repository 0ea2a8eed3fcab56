"""A model's tokenizer files and its chat template."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation
from tests.fuzz.mutate import (
    RAW_JSON,
    SPECIAL_FILES,
    byte_mutations,
    edit_json,
    json_mutations,
    put_in_place,
    replace_file,
)

__all__ = ["template_cases", "tokenizer_cases"]

NAME, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NUM_RANDOM = 40
ALPACA = ("alpaca", "evaluate alpaca")

MODEL_CHANGES: dict[str, Any] = {
    "no model": {"model": None},
    "an unknown model": {"model": {"type": "Evil"}},
    "a word-level model": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
    "added tokens null": {"added_tokens": None},
    "added tokens of text": {"added_tokens": ["x"]},
    "version 2": {"version": "2.0"},
    "an unknown normalizer": {"normalizer": {"type": "Evil"}},
    "an unknown pre-tokenizer": {"pre_tokenizer": {"type": "Evil"}},
    "a pattern without end": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    },
    "a bad pattern": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}
    },
}
SETTING_CHANGES: dict[str, tuple[Mapping[str, Any], Expected]] = {
    "an unknown class": ({"tokenizer_class": "EvilTokenizer"}, "same"),
    "a number as class": ({"tokenizer_class": 3}, "same"),
    "another class": ({"tokenizer_class": "LlamaTokenizer"}, "any"),
    "code": ({"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "same"),
    "no end token": ({"eos_token": None}, "any"),
    "a number as end token": ({"eos_token": 5}, "refused"),
    "an end token not known": ({"eos_token": "<nowhere>"}, "any"),
    "an end token as an object": ({"eos_token": {"content": "</s>"}}, "any"),
    "length below 0": ({"model_max_length": -1}, "same"),
    "length as text": ({"model_max_length": "x"}, "same"),
    "added tokens wrong": ({"added_tokens_decoder": {"x": {"content": "a"}}}, "same"),
    "extra tokens wrong": ({"extra_special_tokens": 3}, "same"),
    "template a number": ({"chat_template": 5}, "same"),
    "template a list": ({"chat_template": [{"name": "default", "template": "{{x}}"}]}, "same"),
    "padding on the left": ({"padding_side": "left"}, "same"),
    "padding nowhere": ({"padding_side": "up"}, "same"),
}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
ALL_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
TEMPLATES: dict[str, tuple[str, Expected]] = {
    "plain": (ALL_TURNS, "any"),
    "syntax": ("{% for %}", "refused"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}", "refused"),
    "changes messages": ("{{ messages.append(1) }}", "refused"),
    "range of 10^12": ("{% for i in range(10**12) %}x{% endfor %}", "refused"),
    "endless loop": (LOOP, "refused"),
    "endless loop, quiet": (LOOP.replace("x", ""), "refused"),
    "10 GB of text": ("{{ 'x' * 10**10 }}", "refused"),
    "10 GB, quietly": ("{% set a = 'x' * 10**10 %}" + ALL_TURNS, "any"),
    "power": ("{{ 9 ** 9 ** 9 }}", "refused"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused"),
    "refuses": ("{{ raise_exception('no') }}", "refused"),
    "refuses in lines": ("{{ raise_exception('no\nyes\n\nno') }}", "refused"),
    "undefined": ("{{ nope.x.y }}", "refused"),
    "division by 0": ("{{ 1 / 0 }}", "refused"),
    "types": ("{{ 'a' + 1 }}", "refused"),
    "constant": ("hi", "refused"),
    "empty": ("", "refused"),
    "index": ("{{ messages[99].role }}", "refused"),
    "attribute": ("{{ messages | map(attribute='zz') | join }}", "refused"),
    "import": ("{% import 'x' as y %}", "refused"),
    "include": ("{% include '/etc/passwd' %}", "refused"),
    "unknown filter": ("{{ messages | zzz }}", "refused"),
    "marked": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "any",
    ),
    "marked, but not ended": ("{% generation %}" + ALL_TURNS, "refused"),
    "no assistant": ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", "refused"),
    "backwards": (ALL_TURNS.replace("messages", "messages | reverse"), "any"),
    "surrogates": (ALL_TURNS + "{{ '\\ud800' }}", "any"),
    "date": ("{{ strftime_now('%d %B %Y') }}" + ALL_TURNS, "any"),
    "date of lists": ("{{ strftime_now([]) }}" + ALL_TURNS, "refused"),
    "JSON of itself": ("{{ namespace | tojson }}", "refused"),
    "last turn alone": ("{{ messages[-1].content }}", "any"),
}


def tokenizer_cases(generator: Random) -> Iterator[Case]:
    """Yield damaged and foreign tokenizer files."""

    def case(name: str, mutation: Mutation, expected: Expected = "same") -> Case:
        base = generator.choice(ALPACA)
        return Case("tokenizer", name, base, mutations={"model": mutation}, expected=expected)

    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", replace_file(NAME, content), "refused")
        yield case(f"settings raw: {name}", replace_file(SETTINGS, content))
        yield case(f"special tokens raw: {name}", replace_file("special_tokens_map.json", content))
        yield case(f"added tokens raw: {name}", replace_file("added_tokens.json", content))
    for name, special in SPECIAL_FILES.items():
        yield case(f"file: {name}", put_in_place(special, NAME), "refused")
        yield case(f"settings file: {name}", put_in_place(special, SETTINGS))
    yield case("none", replace_file(NAME, None), "any")
    for name, changes in MODEL_CHANGES.items():
        change = edit_json(lambda value, c=changes: value | c, NAME)
        yield case(name, change, "any" if "pattern without" in name else "same")
    yield case("ids too large", edit_json(lambda value: _move_ids(value, 10**6), NAME), "refused")
    yield case("ids below 0", edit_json(lambda value: _move_ids(value, -500), NAME), "refused")
    for name, (settings, expected) in SETTING_CHANGES.items():
        change = edit_json(lambda value, c=settings: value | c, SETTINGS)
        yield case(f"settings: {name}", change, expected)
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_json(generator.randrange(2**32), NAME), "any")
        yield case(
            f"settings random {number}", _random_json(generator.randrange(2**32), SETTINGS), "any"
        )
        yield case(f"bytes {number}", _random_bytes(generator.randrange(2**32)), "any")


def template_cases(generator: Random) -> Iterator[Case]:
    """Yield templates that fail, never end, or say something else."""
    for name, (template, expected) in TEMPLATES.items():
        yield Case(
            "template",
            name,
            "chat",
            mutations={"model": replace_file(TEMPLATE, template.encode(errors="surrogatepass"))},
            expected=expected,
        )
        yield Case(
            "template",
            f"given: {name}",
            "chat",
            words=("--chat_template", "{inputs}/t.jinja"),
            mutations={"chat": _beside(template)},
            expected=expected,
        )
    for name, special in SPECIAL_FILES.items():
        yield Case("template", f"file: {name}", "chat", expected="any",
                   mutations={"model": put_in_place(special, TEMPLATE)})  # fmt: skip
    for content in (b"\xff", b"\0", b""):
        yield Case("template", f"bytes {content!r}", "chat", expected="refused",
                   mutations={"model": replace_file(TEMPLATE, content)})  # fmt: skip
    for number in range(NUM_RANDOM):
        seed = generator.randrange(2**32)
        yield Case("template", f"random {number}", "chat", expected="any",
                   mutations={"model": _random_template(seed)})  # fmt: skip


def _beside(template: str) -> Mutation:
    def apply(data: Path) -> None:
        (data.parent / "t.jinja").write_bytes(template.encode(errors="surrogatepass"))

    return apply


def _move_ids(value: Any, distance: int) -> None:
    vocabulary = value["model"]["vocab"]
    value["model"]["vocab"] = {piece: number + distance for piece, number in vocabulary.items()}


def _random_json(seed: int, name: str) -> Mutation:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        ((_, _, change),) = json_mutations(value, Random(seed), 1)
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def _random_bytes(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        ((_, changed),) = byte_mutations((folder / NAME).read_bytes(), Random(seed), 1)
        (folder / NAME).write_bytes(changed)

    return apply


def _random_template(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        ((_, changed),) = byte_mutations(ALL_TURNS.encode(), Random(seed), 1)
        (folder / TEMPLATE).write_bytes(changed)

    return apply
