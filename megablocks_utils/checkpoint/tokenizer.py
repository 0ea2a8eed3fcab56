"""Load the tokenizer from a model's folder."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import CheckpointError

__all__ = ["load_tokenizer"]

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "tekken.json")
TOKENIZER_JSON_FILES = ("tokenizer.json", "tokenizer_config.json") + (
    "special_tokens_map.json",
    "added_tokens.json",
)
LFS_POINTER = b"version https://git-lfs"
CODE_WANTED = "contains custom code"
"""What transformers says of a tokenizer with a class of its own."""
PROBE = "The answer is 1, or: yes."


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer; None for a folder without one (tokenized data needs none).

    Code that came with the model is never run.

    Raises:
        CheckpointError: its files cannot be used.
    """
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        return None

    def unusable(reason: str) -> CheckpointError:
        if CODE_WANTED in reason:
            reason = "it needs code that came with it, which is never run"
        cause = _find_unreadable(folder) or reason
        return CheckpointError(f"the tokenizer in {folder} cannot be used: {cause}")

    with ForeignCode(unusable):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise unusable(f"it is {type(tokenizer).__name__}")
        if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            # As transformers makes one of a class whose files are missing.
            raise unusable("it has no tokens for text; are all of its files there?")
        # Half a surrogate pair in a setting could not be saved with the trained model.
        settings = [tokenizer.init_kwargs, tokenizer.special_tokens_map, tokenizer.chat_template]
        json.dumps(settings, ensure_ascii=False, default=str).encode()
    return tokenizer


def _find_unreadable(folder: Path) -> str | None:
    """Return what is wrong with the first file that is not the JSON object it should be."""
    for name in TOKENIZER_JSON_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = path.read_bytes()
            if content.startswith(LFS_POINTER):
                return f"{name} is a pointer of Git LFS; the file itself was not fetched"
            if not isinstance(json.loads(content), dict):
                return f"{name} holds no JSON object"
        except (OSError, ValueError, RecursionError) as error:
            return f"{name} is no JSON file: {error}"
    return None
