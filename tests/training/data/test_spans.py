"""Which tokens of a text are learned, with tokenizers of every kind and a slow reference."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.spans import encode_spans
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.tiny_tokenizers import KINDS, build_tokenizer

IGNORED = -100
CASES = [
    ("### Response:", "Three of course", ""),
    ("### Response:", "\nThree", ""),
    ("### Response: ", "Three  of\n\n", ""),
    ("[INST] Hi [/INST]", " Hello there", "</s>[INST] Hi"),
    ("<s>user: Hi\n", "assistant:  ok \n", "user"),
    ("", "Größe 東京 🙂", " user"),
    ("user ", "", "user"),
    ("a", " \n ", "b"),
]


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def label_slowly(tokenizer, text, low, high):
    """Look at every character of every token, which the tokenizer's own words give."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels, before = [], 0
    for token, (start, end) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        if start == end:  # a blank that its offsets were trimmed by
            start, end = before, max(end, before + 1)
        before = end
        shared = [c for place, c in enumerate(text) if start <= place < end and low <= place < high]
        visible = [c for c in text[start:end] if not c.isspace()]
        is_learned = any(not c.isspace() for c in shared) or (shared and not visible)
        is_within = shared and low <= start and end <= high
        labels.append(token if is_learned or is_within else IGNORED)
    return encoding.input_ids, labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "answer", "after"), CASES)
def test_labels_are_those_of_a_slow_reference(kind, before, answer, after):
    tokenizer, text = build_tokenizer(kind), before + answer + after
    span = (len(before), len(before) + len(answer))
    ids, labels = encode_spans([text], [[span]], tokenizer)[0]
    assert (ids, labels) == label_slowly(tokenizer, text, *span)
    assert ids == plain(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_gains_no_stray_word_start(kind):
    tokenizer = build_tokenizer(kind)
    text = "### Response:Three of course"
    ids, labels = encode_spans([text], [[(13, len(text))]], tokenizer, end_token_id=1)[0]
    assert ids == [*plain(tokenizer, text), 1]
    learned = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
    assert learned[-1] == "</s>"
    said = "".join(token.removeprefix("##") for token in learned[:-1])
    assert said.replace("▁", "Ġ").replace("Ġ", "").lower() == "threeofcourse"
    assert not said.startswith("▁")


def test_without_a_token_over_the_border_prompt_and_answer_are_as_apart():
    tokenizer = tiny_tokenizer(adds_bos=True)
    texts, spans, apart = [], [], []
    for before, answer, _ in CASES[:3]:
        texts.append(before + answer)
        spans.append([(len(before), len(before + answer))])
        prompt, learned = plain(tokenizer, before), [*plain(tokenizer, answer), 1]
        apart.append(([0, *prompt, *learned], [IGNORED] * (len(prompt) + 1) + learned))
    assert encode_spans(texts, spans, tokenizer, add_start=True, end_token_id=1) == apart


def bpe(*merges):
    """Build a BPE of single characters and some merges, without words."""
    letters = sorted({c for pair in merges for c in pair} | set(":\n THuser.Hi"))
    tokens = [c for c in letters if len(c) == 1] + [a + b for a, b in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [*merges])))


BORDERS = [
    # What the answer says is learned, also joined with the prompt's last character.
    ((":", "T"), "e:", "Tuse", "", [":T", "u", "s", "e"]),
    ((" ", "T"), "e ", "T", "", [" T"]),
    # A line break that the prompt takes in is not.
    ((":", "\n"), "e:", "\nT", "", ["T"]),
    # The next turn's word is not, though it takes in the blank that the answer ends with.
    ((" ", "u"), "e", "Hi ", "use", ["H", "i"]),
    # Blanks joined over a border have no other text.
    (("\n", "\n"), "e", "Hi\n", "\nuse", ["H", "i", "\n\n"]),
]


@pytest.mark.parametrize(("merge", "before", "answer", "after", "learned"), BORDERS)
def test_tokens_over_a_border(merge, before, answer, after, learned):
    tokenizer = bpe(merge)
    span = (len(before), len(before + answer))
    _, labels = encode_spans([before + answer + after], [[span]], tokenizer)[0]
    found = [label for label in labels if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(found) == learned


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_eats_the_blank_before_it_stays_unlearned(kind):
    eats = AddedToken("<|user|>", special=True, lstrip=True, rstrip=True)
    tokenizer = build_tokenizer(kind, user=eats)
    text = "Hello there \n<|user|> Hi"
    _, labels = encode_spans([text], [[(0, 13)]], tokenizer)[0]
    header = tokenizer.convert_tokens_to_ids("<|user|>")
    assert header in plain(tokenizer, text) and header not in labels
    assert any(label != IGNORED for label in labels)


class SlowTokenizer:
    """A tokenizer without offsets, one token a word, as those written in Python are."""

    is_fast = False

    def __call__(self, text, add_special_tokens=True):
        words = pre_tokenizers.Whitespace().pre_tokenize_str(text)
        return {"input_ids": [len(word) for word, _ in words]}


def test_a_tokenizer_without_offsets_serves_where_parts_are_as_in_the_whole():
    text = "Say it: three words now. Next"
    ids, labels = encode_spans([text], [[(7, 24)]], SlowTokenizer())[0]
    assert ids == [3, 2, 1, 5, 5, 3, 1, 4]
    assert labels == [IGNORED] * 3 + [5, 5, 3, 1] + [IGNORED]
    with pytest.raises(DataError, match="d:7: the model's tokenizer has no offsets and joins text"):
        encode_spans(["abcd"], [[(2, 4)]], SlowTokenizer(), places=["d:7"])


def test_a_text_that_the_tokenizer_refuses_is_named_with_its_place():
    with pytest.raises(DataError, match="^d:2: the model's tokenizer refuses the text: "):
        encode_spans(["a", "b\ud83d"], [[], []], tiny_tokenizer(), places=["d:1", "d:2"])
