"""Texts with spans to learn into token ids and labels.

A text is tokenized whole, as it is at generation time up to where the model begins to write, and
the spans are found again by the tokens' character offsets. Pieces that are tokenized apart differ:
tokenizers of SentencePiece's kind put a word start before each.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "encode_spans"]

Span = tuple[int, int]
"""First character of a stretch of text, and the one after its last."""


def encode_spans(
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    add_start: bool = False,
    end_token_id: int | None = None,
    places: Sequence[str] = (),
) -> list[Encoded]:
    """Return token ids and labels of texts, of which exactly the spans are learned.

    A token is learned if it shares text with a span. White space counts only for tokens that are
    nothing else: a token whose visible text lies outside stays unlearned although it takes in the
    blank that a span ends or begins with (the next turn's first word or header; a prompt's colon
    joined with the line break after it, which the model is not asked for one by one). A first word
    joined with the prompt's last blank is learned, and so is one joined with visible text of the
    prompt: what the answer says is never lost.

    Args:
        texts: whole texts, prompts and answers together.
        spans: for each text what is learned of it, in order and disjoint.
        tokenizer: of the model.
        add_start: whether the tokenizer's own start tokens go before texts that lack them.
        end_token_id: a token that is appended and learned, unless the text ends with it.
        places: where each text was read, for messages.

    Raises:
        DataError: the tokenizer cannot take a text, or is one without offsets that tokenizes parts
            of a text otherwise than the whole.
    """
    start = _start_tokens(tokenizer) if add_start else []
    if tokenizer.is_fast:
        rows = _encode_with_offsets(texts, spans, tokenizer, places)
    else:
        rows = [
            _encode_prefixes(text, text_spans, tokenizer, places[index] if places else "")
            for index, (text, text_spans) in enumerate(zip(texts, spans, strict=True))
        ]
    return [_add_ends(ids, labels, start, end_token_id) for ids, labels in rows]


def _add_ends(ids: list[int], labels: list[int], start: list[int], end: int | None) -> Encoded:
    if ids[: len(start)] != start:
        ids, labels = start + ids, [IGNORED_LABEL] * len(start) + labels
    if end is not None and ids[-1:] != [end]:
        ids, labels = [*ids, end], [*labels, end]
    return ids, labels


def _start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what the tokenizer itself puts before a text: its bos token, or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def _encode_with_offsets(
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: "PreTrainedTokenizerBase",
    places: Sequence[str],
) -> list[Encoded]:
    if not texts:
        return []
    with ForeignCode(lambda reason: _find_refused(texts, tokenizer, places, reason)):
        batch = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
    rows = zip(batch["input_ids"], batch["offset_mapping"], texts, spans, strict=True)
    return [
        (ids, _labels_in_spans(ids, offsets, text, text_spans))
        for ids, offsets, text, text_spans in rows
    ]


def _find_refused(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    places: Sequence[str],
    reason: str,
) -> DataError:
    """Return the error for texts of which the tokenizer refuses one, with its place."""

    def refused(place: str, reason: str) -> DataError:
        return DataError(f"{place}: the model's tokenizer refuses the text: {reason}")

    for place, text in zip(places, texts, strict=False):
        with ForeignCode(partial(refused, place)):
            tokenizer(text, add_special_tokens=False)
    return DataError(f"the model's tokenizer refuses the texts of the data: {reason}")


def _labels_in_spans(
    ids: list[int], offsets: list[Span], text: str, spans: Sequence[Span]
) -> list[int]:
    """Keep the tokens that share text with a span; the others get the ignored label."""
    if not spans or not ids:
        return [IGNORED_LABEL] * len(ids)
    starts, ends = _fill_empty(offsets)
    lows, highs = np.asarray(spans, dtype=np.int64).T
    # The only span that a token can begin in, or the next one.
    nearest = np.minimum(np.searchsorted(highs, starts, side="right"), len(spans) - 1)
    low, high = lows[nearest], highs[nearest]
    is_learned = (starts < high) & (ends > low)
    reaches_out = is_learned & ((starts < low) | (ends > high))
    for index in np.flatnonzero(reaches_out):
        begin, end = int(starts[index]), int(ends[index])
        shared = text[max(begin, int(low[index])) : min(end, int(high[index]))]
        is_learned[index] = not shared.isspace() or text[begin:end].isspace()
    labels = np.where(is_learned, np.asarray(ids, dtype=np.int64), IGNORED_LABEL)
    return list(map(int, labels.tolist()))


def _fill_empty(offsets: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Return first and last characters of tokens, also of blanks that offsets were trimmed by.

    Tokenizers that leave blanks out of offsets put a token of blanks alone at its end, or at 0.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).T
    is_empty = starts == ends
    if is_empty.any():
        before = np.concatenate(([0], ends[:-1]))
        starts = np.where(is_empty, before, starts)
        ends = np.maximum(ends, starts + 1)
    return starts, ends


def _encode_prefixes(
    text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase", place: str
) -> Encoded:
    """Encode a text with a tokenizer without offsets, by the lengths of its parts' tokens."""

    def encode(part: str) -> list[int]:
        with ForeignCode(lambda reason: _find_refused([part], tokenizer, [place], reason)):
            return list(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else []

    ids = encode(text)
    borders = [0, *(border for span in spans for border in span), len(text)]
    cuts = []
    for border in borders:
        part = encode(text[:border])
        if ids[: len(part)] != part:
            raise DataError(
                f"{place}: the model's tokenizer has no offsets and joins text over the border "
                "between prompt and answer; this needs a fast tokenizer (a tokenizer.json)"
            )
        cuts.append(len(part))
    labels = [IGNORED_LABEL] * len(ids)
    for number, (low, high) in enumerate(pairwise(cuts)):
        if number % 2:
            labels[low:high] = ids[low:high]
    return ids, labels
