"""Keep secrets out of records, logs and messages. Torch-free.

What an option or variable is called says whether its value is a secret; a web address may hold one,
and tokens of the Hub are known by their form.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["REDACTED", "find_secrets", "is_secret_name", "redact_record", "redact_text"]
__all__ += ["redact_words"]

REDACTED = "REDACTED"
"""What stands in the place of a secret."""

_SECRET_NAME = re.compile(
    r"(?:token|secret|passw(?:or)?d|passphrase|passkey|credentials?|(?:api|access|private|auth)_?key"
    r"|(?:^|_)(?:key|pwd|pat|auth))(?:_|$)",
    re.IGNORECASE,
)
_OF_TEXT = frozenset({"token_dispatch"})  # tokens of text
_WORKING_FOLDER = "PWD"  # a shell's, to which paths of options may lead
_ADDRESS = re.compile(r"(?<=://)[^/\s?#'\"]+(?=@)")
_QUERY = re.compile(r"([?&][\w.-]*?(?:token|key|secret|password|signature|sig)=)[^&\s'\"#]+", re.I)
_HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_ASSIGNMENT = re.compile(r"(-{0,2}[\w.-]+)=(.*)", re.DOTALL)
_SHORTEST = 8
"""Characters of a value that is looked for in other texts; a shorter one may be any word."""


def is_secret_name(name: str) -> bool:
    """Return whether an option, key or variable of this name holds a secret."""
    if name.lstrip("-").replace("-", "_") in _OF_TEXT:
        return False
    return _SECRET_NAME.search(name.lstrip("-").replace("-", "_").replace(".", "_")) is not None


def redact_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with every secret replaced, `--name=value` too."""
    return [
        redact_text(name) if secret is None else f"{name}{REDACTED}"
        for name, secret in _find_in_words(words)
    ]


def find_secrets(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the secrets of a command line and of the environment, to be looked for in texts."""
    named = {name for name in environ if is_secret_name(name)} - {_WORKING_FOLDER}
    found = {environ[name] for name in named}
    found |= {secret for _, secret in _find_in_words(words) if secret is not None}
    long = (value for value in found if len(value) >= _SHORTEST)
    return tuple(sorted(long, key=len, reverse=True))


def redact_text(text: str, secrets: Sequence[str] = ()) -> str:
    """Return a text without passwords in addresses, tokens of the Hub, and the secrets given."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _ADDRESS.sub(REDACTED, text)
    text = _QUERY.sub(rf"\g<1>{REDACTED}", text)
    return _HUB_TOKEN.sub(REDACTED, text)


def redact_record(value: Any, secrets: Sequence[str] = ()) -> Any:
    """Return a record for JSON with every text redacted, and every value of a secret's name."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED
            if value[key] and isinstance(value[key], str) and is_secret_name(str(key))
            else redact_record(value[key], secrets)
            for key in value
        }
    if isinstance(value, (list, tuple)):
        return type(value)(redact_record(item, secrets) for item in value)
    return redact_text(value, secrets) if isinstance(value, str) else value


def _find_in_words(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield every word as what may be shown of it, and the secret after that or None."""
    is_secret = False
    for word in words:
        assigned = _ASSIGNMENT.fullmatch(word)
        is_option = word.startswith("--")
        if is_option:
            is_secret = assigned is None and is_secret_name(word)
        if assigned and is_secret_name(assigned[1]):
            yield f"{assigned[1]}=", assigned[2]
        elif is_secret and not is_option:
            yield "", word
        else:
            yield word, None
