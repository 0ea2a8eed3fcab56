"""Hold what every textual data format shares: the text check and batched tokenization."""

from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "Encoded", "check_text", "encode_batch", "json_type"]

IGNORED_LABEL = -100
"""Label of a token that is not learned, as in transformers and torch's cross entropy."""

Encoded = tuple[list[int], list[int]]
"""Token ids of one example and their labels, equally long."""


def json_type(value: Any) -> str:
    """Name the type of a value as JSON's readers know it."""
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null"}
    names |= {bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def check_text(place: str, name: str, value: Any) -> None:
    """Raise DataError unless ``value`` is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be text, this is {json_type(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {name} holds half a surrogate pair at character {error.start}"
        ) from error


def encode_batch(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Return the token ids of many texts, with nothing added before or after them."""
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return batch["input_ids"]
