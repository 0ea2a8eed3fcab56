"""Write the date of a run into a chat template that asks for it.

A template that writes today's date renders the same data otherwise on another day, and a run that
is resumed would learn from other prompts than it began with. So a run has one date, that of its
first start.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["date_written_out", "writes_date"]

_FUNCTION = "strftime_now"
_CALL = re.compile(_FUNCTION + r"""\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def writes_date(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    """Say whether the tokenizer's chat template asks for the date."""
    template = getattr(tokenizer, "chat_template", None)
    return _FUNCTION in json.dumps(template, default=str)


@contextmanager
def date_written_out(tokenizer: "PreTrainedTokenizerBase | None", day: date) -> Iterator[None]:
    """Let the tokenizer's chat template write `day` where it asks for today, at midnight.

    transformers hands templates plain data only, and so no function that tells another day.
    """
    if tokenizer is None or not writes_date(tokenizer):
        yield
        return
    template = tokenizer.chat_template
    midnight = datetime.combine(day, time())

    def write(source: object) -> object:
        return _CALL.sub(_written(midnight), source) if isinstance(source, str) else source

    if isinstance(template, dict):
        tokenizer.chat_template = {name: write(source) for name, source in template.items()}
    else:
        tokenizer.chat_template = write(template)
    try:
        yield
    finally:
        tokenizer.chat_template = template


def _written(moment: datetime) -> Callable[[re.Match[str]], str]:
    def write(call: re.Match[str]) -> str:
        return json.dumps(moment.strftime(call[1] or call[2] or ""), ensure_ascii=False)

    return write
