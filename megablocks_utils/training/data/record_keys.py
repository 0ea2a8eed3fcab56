"""Say of every key of a record whether it is used, refused or ignored.

A key is *used* where the record's format gives it a meaning. It is *ignored*, and named once in the
log, where its name says that it tells about the example, not what to learn: an id, a source, a
score. Every other key is *refused*, because dropping it could change what is learned. A null or
empty value counts as no key: typed tables write nulls where a record has none.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.text import json_type

__all__ = ["check_keys", "find_repeats", "is_absent", "is_about_the_example", "shorten"]

REFUSED_KEYS = {
    key: reason
    for keys, reason in (
        (
            ("chosen", "rejected", "margin", "score_chosen", "score_rejected"),
            "preference pairs are not trained on: give the wanted answer alone",
        ),
        (("label", "kto_tag"), "good and bad answers are not told apart: keep the good ones alone"),
        (
            ("image", "images", "audio", "audios", "video", "videos", "pixel_values"),
            "only text is trained on",
        ),
        (("chat_template",), "one template serves all records: use --chat_template"),
        (("mask",), "it does not say whether 1 means learned: use train (true or false)"),
        (
            ("weight", "weights", "sample_weight", "loss_weight", "loss_scale"),
            "records have no weights: leave out those that are not to be learned",
        ),
        (("tools", "functions"), "tools need messages or conversations"),
        (("system", "system_prompt", "history"), "this format has no place for it"),
        (("text",), "it is not a rendering of the rest; drop it"),
        (("refusal",), "a refusal is written as content"),
        (("thinking", "reasoning", "reasoning_content"), "reasoning belongs to an assistant turn"),
    )
    for key in keys
}
OTHER_FORMATS = frozenset(
    ("instruction", "input", "output", "messages", "conversations", "prompt", "completion")
    + ("input_ids", "labels")
)

# The last word of a key that tells about the example, in kinds.
IDENTITY = "id ids idx index uuid guid hash md5 sha1 sha256 checksum"
ORIGIN = """
source sources src origin dataset datasets subset split config file filename filepath path url urls
uri link links website repo repository commit author authors annotator annotators worker user
username generator model license licence copyright provenance version revision provider publisher
citation citations avatar"""
TIME = "date time timestamp datetime created updated modified at year month"
SUBJECT = """
category categories subcategory topic topics subtopic tag tags keyword keywords genre domain domains
subject subjects task area cluster intent type kind title lang language languages locale dialect
country"""
QUALITY = """
score scores rating ratings rank quality difficulty complexity perplexity ppl similarity confidence
probability toxicity toxic sentiment upvotes downvotes likes votes views popularity grade redacted
moderation flagged nsfw safety verified accuracy reward rewards rate level"""
NOTES = (
    "metadata meta info extra extras annotations annotation comment comments note notes embedding"
)
SIZE = "length len size count counts turn turns round rounds chars"
# A key with one of these words may be about training, whatever its last word.
TRAINING = """
loss weight weights mask masks train training trained learn label labels template thinking reasoning
"""
ABOUT_WORDS = frozenset(" ".join((IDENTITY, ORIGIN, TIME, SUBJECT, QUALITY, NOTES)).split())
IDENTITY_WORDS = frozenset(IDENTITY.split())
SIZE_WORDS = frozenset(SIZE.split())
COUNT_WORDS = frozenset(("num", "n", "number", "nb", "total"))
TRAINING_WORDS = frozenset(TRAINING.split())
ABOUT_KEYS = frozenset(
    ("parallel_tool_calls", "cache_control", "embeddings", "unnamed: 0")
    + ("skip_prompt_formatting", "custom_instruction")  # of how OpenHermes 2.5 was made
)
WORD = re.compile(r"[A-Z]?[a-z]+[0-9]*|[A-Z]+(?![a-z])|[0-9]+")
SHOWN_CHARACTERS = 60


def is_absent(value: Any) -> bool:
    """Say whether a value says nothing: null, empty, or an object of nothing but nulls."""
    if isinstance(value, dict):
        return all(item is None for item in value.values())
    return value is None or (isinstance(value, str | list) and len(value) == 0)


def is_about_the_example(key: str, value: Any) -> bool:
    """Say whether a key tells about the example, and not what to learn from it."""
    if key.lower() in ABOUT_KEYS or key.startswith("__index_level_"):
        return True
    words = [word.lower() for word in WORD.findall(key)] if key.isascii() else []
    if not words:
        return False
    if words[-1] in IDENTITY_WORDS:
        return True
    if TRAINING_WORDS & set(words):
        return False
    if words[-1] == "name" and len(words) > 1:
        words = words[:-1]
    if words[-1] in ABOUT_WORDS:
        return True
    is_number = isinstance(value, int | float)
    return is_number and (words[-1] in SIZE_WORDS or words[0] in COUNT_WORDS)


def check_keys(
    place: str,
    columns: Mapping[str, Any],
    used: Iterable[str],
    *,
    owner: str,
) -> set[str]:
    """Return the keys that are ignored: those that are there, not used, and about the example.

    Args:
        place: where the record was read.
        columns: keys and values of a record, or of an object within it.
        used: the keys that have a meaning here.
        owner: what holds the keys, for messages, such as ``a record of messages``.

    Raises:
        DataError: a key that could change what is learned and is not used.
    """
    unused = [key for key in columns if key not in used and not is_absent(columns[key])]
    ignored = {key for key in unused if is_about_the_example(key, columns[key])}
    for key in unused:
        if key not in ignored:
            raise DataError(f"{place}: {owner} has the key {shorten(key)}: {_reason(key)}")
    return ignored


def find_repeats(columns: Mapping[str, Any], used: Iterable[str], texts: Iterable[str]) -> set[str]:
    """Return the keys that hold again what is used: one of the texts, or all (their rendering)."""
    own = [text.strip() for text in texts]
    named = (REFUSED_KEYS.keys() | OTHER_FORMATS) - {"text", "prompt"}
    return {
        key
        for key, value in columns.items()
        if isinstance(value, str)
        and value
        and key not in used
        and key not in named
        and (value.strip() in own or all(text in value for text in own))
    }


def shorten(value: Any) -> str:
    """Return a value as a message shows it: never long, of a list or an object its size."""
    if isinstance(value, list | dict):
        return f"{json_type(value)} of {len(value)}"
    shown = json_type(value) if value is None else repr(value)
    if len(shown) > SHOWN_CHARACTERS:
        return f"{shown[: SHOWN_CHARACTERS - 3]}..."
    return shown


def _reason(key: str) -> str:
    if key in REFUSED_KEYS:
        return REFUSED_KEYS[key]
    if key in OTHER_FORMATS:
        return "two descriptions of one example; drop one of them"
    return "it is not used here and could change what is learned; drop it"
