"""Say what an option that is not known may have been meant to be. Torch-free.

By meaning first: the names that other trainers have for the same thing, then options that are
planned here, then a slip of the pen, then whole words that are shared. Letters alone prove nothing:
--attn_implementation is no slip of --gradient_accumulation_steps.
"""

import difflib
from collections.abc import Collection

from megablocks_utils.config.other_trainers import SYNONYMS
from megablocks_utils.errors import ConfigurationError

__all__ = ["find_hint", "find_slip", "unknown_option"]

_SLIP = 0.8
_COMMON = frozenset(
    ("use", "max", "min", "num", "per", "of", "to", "from", "is", "or", "train", "type", "name")
    + ("path", "size")
)
"""Words of names that prove nothing."""


def unknown_option(flag: str, known: Collection[str]) -> ConfigurationError:
    """Return the error for an option that is not known, naming the one that was probably meant.

    Args:
        flag: As it was written, with dashes.
        known: Names and aliases of all options there are, without dashes.
    """
    name = flag.removeprefix("--").replace("-", "_")
    hint = find_hint(name, known)
    if hint is not None:
        return ConfigurationError(f"unknown option {flag}; did you mean --{hint}?")
    return ConfigurationError(f"unknown option {flag}; --help lists all options.")


def find_hint(name: str, known: Collection[str]) -> str | None:
    """Return the known option that an unknown name probably means; None where none is near.

    Args:
        name: Without dashes.
        known: Names and aliases of all options there are.
    """
    return find_slip(name, known) or _find_by_words(name.lower(), sorted(known))


def find_slip(name: str, known: Collection[str], likeness: float = _SLIP) -> str | None:
    """Return the known option that another trainer calls so, or whose letters are almost these.

    Args:
        name: Without dashes.
        known: Names and aliases of all options there are.
        likeness: How alike the letters must be, from 0 to 1.
    """
    meant = SYNONYMS.get(name.lower())
    if meant in known:
        return meant
    alike = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=likeness)
    return alike[0] if alike else None


def _find_by_words(name: str, names: Collection[str]) -> str | None:
    """Return the option that holds all the words of `name`, or whose words `name` holds."""
    words = set(name.split("_"))

    def distance(other: str) -> tuple[int, float]:
        alike = difflib.SequenceMatcher(None, name, other).ratio()
        return len(words ^ set(other.split("_"))), -alike

    sharing = [
        other
        for other in names
        if (others := set(other.split("_"))) and (words <= others or others <= words)
        if (words & others) - _COMMON
    ]
    return min(sharing, key=distance, default=None)
