"""Tokenized examples from lists, in memory."""

from collections.abc import Sequence

import numpy as np

from megablocks_utils.training.data.cut import cut_examples
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.source_tokens import SourceTokens
from megablocks_utils.training.data.text import Encoded
from megablocks_utils.training.data.token_files import TOKEN_LIMIT, StoredTokens


def examples_of(encoded: Sequence[Encoded]) -> TokenizedExamples:
    """Hold examples given as token ids and labels, each with a label to learn, uncut."""
    lengths = [len(ids) for ids, _ in encoded]
    labels = np.concatenate([np.array(labels, np.int32) for _, labels in encoded])
    ends = np.cumsum(lengths)
    labels[ends - lengths] = -100
    input_ids = np.concatenate([np.array(ids, np.int32) for ids, _ in encoded])
    contents = {"format_name": "", "ignored_keys": (), "template_date": None}
    tokens = StoredTokens(input_ids, None, labels, ends, contents)
    return TokenizedExamples([SourceTokens(tokens, cut_examples(tokens, TOKEN_LIMIT))])
