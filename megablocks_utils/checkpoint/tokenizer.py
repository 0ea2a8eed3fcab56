"""Load the tokenizer from a model's folder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megablocks_utils.errors import CheckpointError

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the model's tokenizer; None for a folder without one (tokenized data needs none).

    Raises:
        CheckpointError: its files cannot be used.
    """
    if not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be used: {error}") from error
