"""The assistant's turns in renderings of templates that behave as published ones do."""

import time

import pytest
from transformers import PreTrainedTokenizerBase

from megablocks_utils.errors import DataError
from megablocks_utils.training.data import chat_template
from megablocks_utils.training.data.chat import encode_messages
from megablocks_utils.training.data.conversation import Conversation
from tests.support import chat_templates as like
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello, you"}
BYE = {"role": "user", "content": "Bye"}
SO_LONG = {"role": "assistant", "content": "So long"}
TALK = [HI, HELLO, BYE, SO_LONG]
THINK = "<think>\n{}\n</think>\n\n"


def converse(messages, *, learned=None, **given):
    is_learned = tuple(
        m["role"] == "assistant" and (learned is None or number in learned)
        for number, m in enumerate(messages)
    )
    return Conversation("c.jsonl:4", list(messages), is_learned, **given)


def encode(template, messages, **given):
    tokenizer = tiny_tokenizer(chat_template=template)
    return tokenizer, encode_messages([converse(messages, **given)], tokenizer)


def read_turns(template, messages, **given):
    """Return for each example the texts that are learned, each stretch by itself."""
    tokenizer, examples = encode(template, messages, **given)
    found = []
    for ids, labels in examples:
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        stretches = [[]]
        for label in labels:
            if label != -100:
                stretches[-1].append(label)
            elif stretches[-1]:
                stretches.append([])
        found.append([tokenizer.decode(stretch) for stretch in stretches if stretch])
    return found


def ends(end, *texts):
    return [text + end for text in texts]


ONE_EXAMPLE = [
    (CHATML, "</s>"),
    (like.LLAMA3_LIKE, "<|eot_id|>"),
    (like.GEMMA_LIKE, "<end_of_turn>"),
    (like.DEEPSEEK_LIKE, "<|end|>"),
    (like.LATE_SYSTEM, "</s>"),
    (like.NO_END, "\n"),
    (like.MERGES, "</s>"),
]


@pytest.mark.parametrize(("template", "end"), ONE_EXAMPLE)
@pytest.mark.parametrize("first", [[], [SYSTEM]])
def test_a_template_that_writes_all_turns_alike_gives_one_example(template, end, first):
    start = " " if template == like.LATE_SYSTEM else ""
    texts = ends(end, f"{start}Hello, you", f"{start}So long")
    assert read_turns(template, [*first, *TALK]) == [texts]
    tokenizer, examples = encode(template, [*first, *TALK])
    whole = tokenizer.apply_chat_template([*first, *TALK], tokenize=False)
    assert tokenizer.decode(examples[0][0]) == whole


@pytest.mark.parametrize(("template", "end"), ONE_EXAMPLE)
def test_only_turns_that_are_to_be_learned_are(template, end):
    start = " " if template == like.LATE_SYSTEM else ""
    (texts,) = read_turns(template, [*TALK, HI, HELLO], learned={3})
    assert texts == ends(end, f"{start}So long")
    assert read_turns(template, TALK, learned=set()) == [[]]


REWRITES = [
    (like.QWEN3_LIKE, THINK.format("") + "{}<|im_end|>"),
    (like.HARMONY_LIKE, "<|channel|>final<|message|>{}<|return|>"),
    (like.ENDS_ONLY_LAST, " {}</s>"),
]


@pytest.mark.parametrize(("template", "form"), REWRITES)
@pytest.mark.parametrize("first", [[], [SYSTEM]])
def test_a_rewriting_template_gives_each_turn_as_it_is_when_it_is_the_last(template, form, first):
    messages = [*first, *TALK]
    texts = [form.format("Hello, you"), form.format("So long")]
    assert read_turns(template, messages) == [[text] for text in texts]
    tokenizer, examples = encode(template, messages)
    for (ids, labels), count in zip(examples, (len(first) + 2, len(messages)), strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[: count - 1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        assert tokenizer.decode(ids) == whole
        learned = [label != -100 for label in labels].index(True)
        assert tokenizer.decode(ids[:learned]) == prompt


def find_slowly(tokenizer, messages):
    """Find the turns of a template that never rewrites: what each adds to its prompt."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            assert after.startswith(before)
            spans.append(after[len(before) :].rstrip())
    return spans


@pytest.mark.parametrize("template", [CHATML, like.MIXTRAL_LIKE, like.LLAMA3_LIKE])
@pytest.mark.parametrize("answer", ["", " ", "\n\nTwo", "  ok \n", "</s>", "Größe 東京 🙂", "Hi"])
def test_unusual_texts_are_found_as_slowly(template, answer):
    unusual = {"role": "assistant", "content": answer}
    odd = {"role": "user", "content": answer}
    for messages in ([HI, unusual, BYE, SO_LONG], [odd, HELLO, odd, unusual], [HI, unusual]):
        tokenizer = tiny_tokenizer(chat_template=template)
        (texts,) = read_turns(template, messages)
        assert texts == find_slowly(tokenizer, messages)


ROWS = [
    (CHATML, [["Hello, you</s>", "So long</s>"]]),
    (like.LATE_SYSTEM, [[" Hello, you</s> So long</s>"]]),
    (like.MERGES, [["Hello, you</s>"], ["\n\nSo long</s>"]]),
    (like.ENDS_ONLY_LAST, [[" Hello, you</s>"], [" So long</s>"]]),
]


@pytest.mark.parametrize(("template", "examples"), ROWS)
def test_turns_in_a_row(template, examples):
    assert read_turns(template, [HI, HELLO, SO_LONG]) == examples


LEADING = [
    (CHATML, [["Hello, you</s>", "So long</s>"]]),
    (like.GEMMA_LIKE, [["Hello, you<end_of_turn>", "So long<end_of_turn>"]]),
    (like.DEEPSEEK_LIKE, [["Hello, you<|end|>", "So long<|end|>"]]),
    (like.ENDS_ONLY_LAST, [[" Hello, you</s>"], [" So long</s>"]]),
    (
        # Needs a question, as Qwen3.5's.
        "{% if 'user' not in messages | map(attribute='role') %}"
        "{{ raise_exception('no question') }}{% endif %}" + CHATML,
        [["Hello, you</s>", "So long</s>"]],
    ),
]


@pytest.mark.parametrize(("template", "examples"), LEADING)
def test_a_leading_answer_is_learned_as_it_is_written(template, examples):
    assert read_turns(template, [HELLO, BYE, SO_LONG]) == examples


def call(**arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return [{"type": "function", "function": function}]


CALLS = [
    HI,
    {"role": "assistant", "content": "", "tool_calls": call(city="Rome", days=3)},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "", "tool_calls": call(city="Bari", wind=[1, 2])},
    {"role": "tool", "content": "windy"},
    {"role": "tool", "content": "and dry"},
    SO_LONG,
    BYE,
    HELLO,
]
CHATML_CALLS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + ARGUMENTS + '</call>' }}{% endfor %}{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("arguments", ["c.function.arguments | tojson", "c.function.arguments"])
def test_tool_calls_are_learned_as_they_are_written(arguments):
    template = CHATML_CALLS.replace("ARGUMENTS", arguments)  # the second as DeepSeek-V3: JSON text
    assert read_turns(template, CALLS, tools=[{"type": "function"}]) == [
        [
            '<call>get_weather {"city": "Rome", "days": 3}</call></s>',
            '<call>get_weather {"city": "Bari", "wind": [1, 2]}</call></s>',
            "So long</s>",
            "Hello, you</s>",
        ]
    ]


@pytest.mark.parametrize("is_inline", [False, True])
def test_reasoning_is_learned_in_every_turn_also_where_a_template_drops_it_later(is_inline):
    def answer(text, reasoning):
        if is_inline:
            return {"role": "assistant", "content": THINK.format(reasoning) + text}
        return {"role": "assistant", "content": text, "reasoning_content": reasoning}

    messages = [HI, answer("Hello", "hm"), BYE, answer("So long", "well")]
    assert read_turns(like.QWEN3_LIKE, messages) == [
        [THINK.format("hm") + "Hello<|im_end|>"],
        [THINK.format("well") + "So long<|im_end|>"],
    ]


MARKS = [
    # All of the conversation is marked.
    "{% generation %}" + CHATML.replace("{% if add", "{% endgeneration %}{% if add"),
    # The mark reaches over the header and the line break after the end.
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|assistant|>\n' + m.content + '</s>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Marked in a macro, where transformers looks for the mark in another place.
    "{% macro turn(m) %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '</s>\n' }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
]


@pytest.mark.parametrize("template", MARKS)
def test_marks_teach_nothing_but_the_assistants_turns(template):
    assert read_turns(template, TALK) == [["Hello, you</s>", "So long</s>"]]


def test_marks_of_a_rewriting_template_teach_nothing_else_either():
    template = "{% generation %}" + like.ENDS_ONLY_LAST + "{% endgeneration %}"
    assert read_turns(template, TALK) == [[" Hello, you</s>"], [" So long</s>"]]


def test_marks_may_leave_parts_of_a_turn_out():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{% generation %}</s>{% endgeneration %}{{ '\n' }}{% endif %}"
        "{% endfor %}"
    )
    assert read_turns(template, TALK) == [["</s>", "</s>"]]


def test_a_mark_that_ends_on_a_stripped_blank_teaches_no_other_turn():
    # transformers#47325
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    )
    assert read_turns(template, [{"role": "assistant", "content": "A"}, HI]) == [["A"]]


LEFT_OUT = [
    (
        CHATML.replace("%}{{ '<|'", "%}{% if message['role'] != 'tool' %}{{ '<|'", 1).replace(
            "{% endfor", "{% endif %}{% endfor"
        ),
        [HI, HELLO, {"role": "tool", "content": "sunny"}, SO_LONG],
        "message 3 (role tool)",
    ),
    (
        CHATML,
        [HI, {**HELLO, "reasoning_content": "hm"}],
        "the reasoning_content of message 2",
    ),
    (
        like.DEEPSEEK_LIKE,
        [HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}],
        "the reasoning in the content of message 2",
    ),
]


@pytest.mark.parametrize(("template", "messages", "what"), LEFT_OUT)
def test_a_template_that_leaves_out_what_is_said_is_refused(template, messages, what):
    with pytest.raises(DataError, match="leaves out") as caught:
        encode(template, messages)
    assert str(caught.value).startswith(f"c.jsonl:4: the chat template leaves out {what}")


@pytest.mark.parametrize("template", [CHATML, like.LATE_SYSTEM, like.LLAMA3_LIKE, MARKS[1]])
def test_a_long_chat_takes_no_more_renderings_than_a_short_one(template, monkeypatch):
    counts = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def count(*args, **given):
        counts[-1] += 1
        return apply(*args, **given)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", count)
    for exchanges in (3, 60):
        counts.append(0)
        messages = [
            {"role": role, "content": f"{role} says {number}"}
            for number in range(exchanges)
            for role in ("user", "assistant")
        ]
        (texts,) = read_turns(template, messages)
        assert len(texts) == exchanges
    assert counts[0] == counts[1] <= 6


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"
)
FAILING = [
    (ENDLESS, "it takes more than 0.3 s"),
    ("{{ 9 ** (9 ** (9 ** 9)) }}", "it takes more than 0.3 s"),
    ("{{ 'ab' * 10 ** 12 }}", "it needs too much memory"),
    ("{% for i in range(10 ** 12) %}x{% endfor %}", "Range too big"),
    ("{{ messages[7].content }}", "list object has no element 7 (UndefinedError)"),
    ("{{ 1 // 0 }}", "integer division or modulo by zero (ZeroDivisionError)"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
    ("{% for %}", "Expected an expression, got 'end of statement block' (TemplateSyntaxError)"),
    (CHATML + "{{ '\ud83d' }}", "the model's tokenizer refuses the text: "),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ({"rag": CHATML, "tool": CHATML}, "of the tokenizer's (rag, tool) none is its default"),
]


@pytest.mark.parametrize(("template", "reason"), FAILING)
def test_whatever_a_template_does_is_one_sentence(template, reason, monkeypatch):
    monkeypatch.setattr(chat_template, "RENDERING_LIMIT_S", 0.3)
    started_s = time.monotonic()
    with pytest.raises(DataError) as caught:
        encode(template, TALK)
    assert time.monotonic() - started_s < 5
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(template, dict) or str(caught.value).startswith("c.jsonl:4: ")


def test_a_default_among_named_templates_is_used_and_one_for_tools_with_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = {"default": CHATML, "tool_use": "{{ tools[0].function.name }}" + CHATML}
    assert read_turns(template, TALK) == [["Hello, you</s>", "So long</s>"]]
    tokenizer, examples = encode(template, TALK, tools=tools)
    assert tokenizer.decode(examples[0][0]).startswith("f<|user|>")
