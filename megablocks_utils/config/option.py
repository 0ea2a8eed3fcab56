"""What a row of the table of options says."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Option"]

Kind = Literal["text", "integer", "number", "boolean", "words"]


@dataclass(frozen=True)
class Option:
    """Describe one option of the command line.

    Attributes:
        name: Its name without dashes, also the name of the field in `RunConfig`'s sections.
        kind: How its text is read; `words` takes several, separated by commas or spaces.
        default: Value when it is not given; None where `shown_default` says what decides.
        help: One line for people.
        choices: The words it may be; empty where any text or number goes.
        aliases: Other names that mean the same.
        minimum: Smallest number allowed, or None.
        maximum: Largest number allowed, or None.
        above: Number that the value must exceed, or None.
        shown_default: What `--help` prints as default where `default` alone says too little.
        passed_on: Entry points that hand it to Hugging Face's TrainingArguments unread.
    """

    name: str
    kind: Kind
    default: object
    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    shown_default: str | None = None
    passed_on: tuple[str, ...] = ()
