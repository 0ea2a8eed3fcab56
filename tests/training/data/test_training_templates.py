"""Shipped training templates against the published behaviour, and which template is saved."""

from pathlib import Path

import pytest

from megablocks_utils.config import DataConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.data.chat import encode_messages
from megablocks_utils.training.data.conversation import Conversation
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.training_templates import (
    choose_chat_template,
    list_training_templates,
)
from tests.support import chat_templates as like
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

ROOT = Path(__file__).parents[3]
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello, you"}
BYE = {"role": "user", "content": "Bye"}
SO_LONG = {"role": "assistant", "content": "So long"}
TALK = [HI, HELLO, BYE, SO_LONG]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def shipped(name):
    return choose_chat_template(name, tiny_tokenizer()).training


def render(template, messages, **options):
    return tiny_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, **options
    )


CHATML_BY_HAND = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello, you<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\nSo long<|im_end|>\n"
)
MISTRAL_BY_HAND = "<s> [INST] Be brief.\n\nHi [/INST] Hello, you</s> [INST] Bye [/INST] So long</s>"
DEEPSEEK_BY_HAND = (
    "<s>Be brief.<｜User｜>Hi<｜Assistant｜>Hello, you<｜end▁of▁sentence｜>"
    "<｜User｜>Bye<｜Assistant｜>So long<｜end▁of▁sentence｜>"
)
BY_HAND = [
    ("chatml", CHATML_BY_HAND, "<|im_start|>assistant\n"),
    ("mistral", MISTRAL_BY_HAND, ""),
    ("deepseek-v3", DEEPSEEK_BY_HAND, "<｜Assistant｜>"),
    ("llama3", render(like.LLAMA3_LIKE, [SYSTEM, *TALK]),
     "<|start_header_id|>assistant<|end_header_id|>\n\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "header"), BY_HAND)
def test_a_training_template_writes_what_the_models_do(name, text, header):
    messages = [SYSTEM, *TALK]
    assert render(shipped(name), messages) == text
    prompt = render(shipped(name), messages[:-1], add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith(header)


@pytest.mark.parametrize("first", [[], [SYSTEM]])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_qwen3_writes_every_answer_as_the_models_own_writes_the_last(first, tools):
    reasoned = {**HELLO, "reasoning_content": "hm"}
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "dry"}]
    for turn in ([HELLO], [reasoned], [inline], [called], [called, *results, SO_LONG]):
        messages = [*first, HI, *turn]
        text = render(shipped("qwen3"), messages, tools=tools)
        last = render(shipped("qwen3"), messages[:-1], tools=tools, add_generation_prompt=True)
        if len(turn) == 1 and not tools:
            assert text == render(like.QWEN3_LIKE, messages)
        assert text.startswith(last)
        assert ("# Tools" in text) == bool(tools)
    prompt = {"add_generation_prompt": True, "enable_thinking": False}
    assert render(shipped("qwen3"), TALK[:1], **prompt).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", list_training_templates())
def test_a_training_template_gives_one_example_with_every_turn_and_its_end(name):
    tokenizer = tiny_tokenizer(chat_template=shipped(name))
    conversation = Conversation("c:1", TALK, (False, True, False, True))
    (example,) = encode_messages([conversation], tokenizer)
    learned = tokenizer.decode([label for label in example[1] if label != -100])
    expected = {
        "chatml": "{}<|im_end|>",
        "deepseek-v3": "{}<｜end▁of▁sentence｜>",
        "llama3": "{}<|eot_id|>",
        "mistral": " {}</s>",
        "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    }[name]
    assert learned == expected.format("Hello, you") + expected.format("So long")


def test_the_templates_are_documented_and_packaged():
    names = ", ".join(f"`{name}`" for name in list_training_templates())
    assert names in " ".join((ROOT / "data" / "README.md").read_text().split())
    assert '"training/data/templates/*.jinja"' in (ROOT / "pyproject.toml").read_text()


SAVED = [
    # The tokenizer's own template prompts alike, so it is kept.
    (like.QWEN3_LIKE, "qwen3", like.QWEN3_LIKE),
    (like.LLAMA3_LIKE, "llama3", like.LLAMA3_LIKE),
    # It prompts otherwise, or is not there: who serves the model needs the other one.
    (CHATML, "chatml", None),
    (None, "qwen3", None),
    ({"rag": CHATML}, "chatml", None),
    # Of several of its own, the one that is chosen becomes the default.
    ({"rag": CHATML, "default": "x"}, "rag", {"rag": CHATML, "default": CHATML}),
]


@pytest.mark.parametrize(("own", "name", "saved"), SAVED)
def test_the_template_that_is_saved_prompts_as_the_one_of_training(own, name, saved):
    tokenizer = tiny_tokenizer(chat_template=own)
    chosen = choose_chat_template(name, tokenizer)
    if saved is not None:
        assert chosen.saved == saved
        return
    assert "generation %}" not in chosen.saved.replace("add_generation", "")
    for messages in ([HI], [SYSTEM, HI], TALK):
        for prompts in (False, True):
            options = {"add_generation_prompt": prompts}
            expected = render(chosen.training, messages, **options)
            assert render(chosen.saved, messages, **options) == expected


def test_a_run_trains_with_the_named_file_and_leaves_it_with_the_tokenizer(tmp_path):
    data, template = tmp_path / "chat.json", tmp_path / "mine.jinja"
    data.write_text('[{"messages": [{"role": "user", "content": "Hi"}, '
                    '{"role": "assistant", "content": "Yes"}]}]')  # fmt: skip
    template.write_text(CHATML.replace("</s>", "</s></s>"), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    examples = load_examples(DataConfig((str(data),), chat_template=str(template)), tokenizer)
    labels = examples[0][1]
    assert tokenizer.decode(labels[labels != -100]) == "Yes</s></s>"
    assert tokenizer.chat_template == template.read_text()
    own = tiny_tokenizer(chat_template=like.LLAMA3_LIKE)
    load_examples(DataConfig((str(data),), chat_template="llama3"), own)
    assert own.chat_template == like.LLAMA3_LIKE
    plain = load_examples(DataConfig((str(data),)), tiny_tokenizer())
    assert plain.checksum() != examples.checksum()


WRONG = [
    ("missing.jinja", "chat_template is missing.jinja, but there is no such file."),
    ("qwen9", "chat_template is qwen9, but it must be a .jinja file or one of the training "
     "templates: chatml, deepseek-v3, llama3, mistral, qwen3."),
    ("bad.jinja", "chat_template is bad.jinja, which is no chat template: line 2: Expected an "
     "expression, got 'end of statement block'."),
    ("empty.jinja", "chat_template is empty.jinja, which is no chat template: it is empty."),
    ("latin.jinja", "chat_template is latin.jinja, which is no UTF-8 text."),
    ("folder.jinja", "chat_template is folder.jinja, but there is no such file."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_a_template_that_cannot_be_used_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("{{ x }}\n{% for %}")
    Path("empty.jinja").write_text(" \n")
    Path("latin.jinja").write_bytes("é".encode("latin-1"))
    Path("folder.jinja").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        choose_chat_template(name, tiny_tokenizer())
    assert str(caught.value) == message
    assert caught.value.parameters == ("chat_template",)


def test_a_template_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigurationError, match="the model has no tokenizer to use it with"):
        choose_chat_template("chatml", None)
