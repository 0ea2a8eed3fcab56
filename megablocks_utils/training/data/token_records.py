"""Check records that hold tokens, and give their tokens and labels without padding."""

from collections.abc import Mapping
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.record_keys import check_keys, is_absent, shorten
from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded

__all__ = ["check_tokens", "read_tokens"]

MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""Names under which TRL and transformers (and others) keep which tokens are learned."""
FOR_OTHERS = ("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "word_ids")
"""What tokenizers add for other uses than training."""
USED = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "seq_lengths")
MAX_TOKEN = 2**31 - 1


def check_tokens(record: Record) -> frozenset[str]:
    """Return the keys of a tokenized record that are ignored.

    Raises:
        DataError: a key that cannot be used, or lists that do not fit together.
    """
    read_tokens(record)
    used = (*USED, *MASKS, *FOR_OTHERS, "text")
    owner = "a record of input_ids and labels"
    ignored = check_keys(record.place, record.columns, used, owner=owner)
    others = {k for k in (*FOR_OTHERS, "text") if not is_absent(record.columns.get(k))}
    return frozenset(ignored | others)


def read_tokens(record: Record) -> Encoded:
    """Return token ids and labels of a record, without what its `attention_mask` hides.

    Labels are used as they are. Without labels, those tokens are learned that every mask beside
    them (`completion_mask`, `assistant_masks`, `loss_mask`) marks.

    Raises:
        DataError: as `check_tokens`.
    """
    place, columns = record.place, record.columns
    input_ids = _whole_numbers(place, "input_ids", columns["input_ids"])
    if input_ids and not 0 <= min(input_ids) <= max(input_ids) <= MAX_TOKEN:
        wrong = min(input_ids) if min(input_ids) < 0 else max(input_ids)
        kind = "negative token" if wrong < 0 else "token"
        raise DataError(f"{place}: input_ids holds the {kind} {shorten(wrong)}")
    labels = _labels(place, columns, input_ids)
    start, end = _visible(place, columns, len(input_ids))
    if any(label != IGNORED_LABEL for label in labels[:start] + labels[end:]):
        raise DataError(f"{place}: labels has a token to learn where attention_mask is 0")
    _check_rest(place, columns, start, end)
    return input_ids[start:end], labels[start:end]


def _labels(place: str, columns: Mapping[str, Any], input_ids: list[int]) -> list[int]:
    masks = [_flags(place, key, columns[key], len(input_ids)) for key in MASKS if key in columns]
    masks = [mask for mask in masks if mask is not None]
    marked = [all(flags) for flags in zip(*masks, strict=True)]
    if columns.get("labels") is None:
        if not masks:
            raise DataError(
                f"{place}: input_ids has no labels beside it; add labels ({IGNORED_LABEL} for what "
                "is not learned; the same as input_ids to learn every token)"
            )
        return [t if is_l else IGNORED_LABEL for t, is_l in zip(input_ids, marked, strict=True)]
    labels = _whole_numbers(place, "labels", columns["labels"])
    _check_length(place, "labels", labels, len(input_ids))
    wrong = [n for n in set(labels) if n != IGNORED_LABEL and not 0 <= n <= MAX_TOKEN]
    if wrong:
        raise DataError(
            f"{place}: labels must be tokens or {IGNORED_LABEL}, this one holds "
            f"{shorten(min(wrong))}"
        )
    # The first token is never learned, so its label may say anything.
    if masks and marked[1:] != [label != IGNORED_LABEL for label in labels[1:]]:
        names = " and ".join(key for key in MASKS if not is_absent(columns.get(key)))
        raise DataError(f"{place}: {names} and labels differ in what is learned; drop one")
    return labels


def _visible(place: str, columns: Mapping[str, Any], length: int) -> tuple[int, int]:
    """Return the range of tokens that `attention_mask` shows; zeros at the ends are padding."""
    mask = _flags(place, "attention_mask", columns.get("attention_mask"), length)
    if mask is None or all(mask):
        return 0, length
    if not any(mask):
        return 0, 0
    start = mask.index(True)
    end = length - mask[::-1].index(True)
    if not all(mask[start:end]):
        raise DataError(
            f"{place}: attention_mask has a 0 between ones (item {mask.index(False, start) + 1}), "
            "only padding at the ends can be left out"
        )
    return start, end


def _check_rest(place: str, columns: Mapping[str, Any], start: int, end: int) -> None:
    """Check what may only say what holds anyway: positions from 0, one type, one text."""
    for key in ("position_ids", "token_type_ids"):
        if is_absent(columns.get(key)):
            continue
        values = _whole_numbers(place, key, columns[key])
        _check_length(place, key, values, len(columns["input_ids"]))
        wanted = list(range(end - start)) if key == "position_ids" else [0] * (end - start)
        if values[start:end] != wanted:
            what = "count from 0" if key == "position_ids" else "all be 0"
            raise DataError(f"{place}: {key} must {what}, other ones are not trained on; drop it")
    lengths = columns.get("seq_lengths")
    if not is_absent(lengths) and lengths != [len(columns["input_ids"])]:
        raise DataError(
            f"{place}: seq_lengths is {shorten(lengths)}: packed texts must be records of their own"
        )


def _flags(place: str, name: str, values: Any, length: int) -> list[bool] | None:
    """Return a list of zeros and ones as booleans; None where there is none."""
    if values is None:
        return None
    if not isinstance(values, list) or not (
        set(map(type, values)) <= {int, bool} and set(values) <= {0, 1}
    ):
        raise DataError(f"{place}: {name} must be a list of zeros and ones")
    _check_length(place, name, values, length)
    return [bool(value) for value in values]


def _check_length(place: str, name: str, values: list[int], length: int) -> None:
    if len(values) != length:
        raise DataError(
            f"{place}: input_ids has {length} items and {name} has {len(values)}, they must be "
            "equally long"
        )


def _whole_numbers(place: str, name: str, values: Any) -> list[int]:
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise DataError(f"{place}: {name} must be a list of whole numbers")
    return values
