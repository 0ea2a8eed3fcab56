"""Which tokens of a conversation are learned, with and without marks in the template."""

import pytest
from tokenizers import processors

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.chat import encode_messages
from megablocks_utils.training.data.chat_records import read_chat
from megablocks_utils.training.data.sources import Record
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

EOS = 1
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
MARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{%- generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '</s>\n' }}{% endif %}{% endfor %}"
)
ONLY_LAST = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPACED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PICKY = "{{ raise_exception('roles must alternate') }}"


def encode(messages, tokenizer):
    record = Record("chat.jsonl:4", {"messages": messages})
    return encode_messages([read_chat(record, "messages").conversation], tokenizer)[0]


def runs(labels):
    """Return the learned stretches."""
    stretches, is_open = [], False
    for label in labels:
        if label == -100:
            is_open = False
        elif is_open:
            stretches[-1].append(label)
        else:
            stretches.append([label])
            is_open = True
    return stretches


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_assistant_turns_are_learned_with_their_end_token(template, adds_bos):
    tokenizer = tiny_tokenizer(chat_template=template, adds_bos=adds_bos)
    ids, labels = encode(TALK, tokenizer)
    assert tokenizer.decode(ids) == (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello, you</s>\n"
        "<|user|>\nBye</s>\n<|assistant|>\nSo long</s>\n"
    )
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in
               ("Hello, you", "So long")]  # fmt: skip
    assert runs(labels) == [[*answers[0], EOS], [*answers[1], EOS]]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_tokens_are_those_the_template_gives_at_generation_time():
    tokenizer = tiny_tokenizer(adds_bos=True)
    ids, labels = encode(TALK[:3], tokenizer)
    prompt = tokenizer.apply_chat_template(
        TALK[:2], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt)] == ids[len(prompt)]


@pytest.mark.parametrize("answer", ["", " ", "\n\nTwo lines before", "Größe 東京 🙂", "ends in \n"])
def test_unusual_answers_end_with_their_end_token(answer):
    tokenizer = tiny_tokenizer()
    _, labels = encode([*TALK[:2], {"role": "assistant", "content": answer}], tokenizer)
    learned = [label for label in labels if label != -100]
    assert learned[-1] == EOS
    assert tokenizer.decode(learned[:-1]).strip() == answer.strip()


@pytest.mark.parametrize("trims_offsets", [False, True])
@pytest.mark.parametrize(
    ("answer", "learned"), [("that", "that</s>"), ("  ok \n", "ok \n</s>"), ("", "</s>")]
)
def test_a_first_word_merged_with_the_prompts_last_blank_is_learned(trims_offsets, answer, learned):
    tokenizer = tiny_tokenizer(chat_template=SPACED)
    if trims_offsets:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ids, labels = encode([TALK[1], {"role": "assistant", "content": answer}], tokenizer)
    assert tokenizer.decode(ids) == f"user: Hi</s>assistant: {answer}</s>"
    assert tokenizer.decode([label for label in labels if label != -100]).lstrip() == learned


WRONG_TEMPLATES = [
    (None, "messages need a chat template and the model's tokenizer has none"),
    (
        ONLY_LAST,
        (
            "chat.jsonl:4: the tokenizer's chat template rewrites earlier turns (message 3 does "
            "not continue what came before it), so its turns cannot be told apart"
        ),
    ),
    (
        PICKY,
        "chat.jsonl:4: the tokenizer's chat template refuses these messages: roles must alternate",
    ),
]


@pytest.mark.parametrize(("template", "message"), WRONG_TEMPLATES)
def test_a_template_that_cannot_serve_is_refused(template, message):
    with pytest.raises(DataError) as caught:
        encode(TALK, tiny_tokenizer(chat_template=template))
    assert str(caught.value) == message
