"""Chat records against what transformers renders of them, and the turns of them that are learned.

The rendering compared with is `apply_chat_template` on the messages as OpenAI and TRL write them.
"""

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.chat_records import check_template_reads
from megablocks_utils.training.data.formats import check_records, find_format, read_conversation
from megablocks_utils.training.data.sources import Record, read_records
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

PLACE = "chat.jsonl:4"
# Joins texts with +, as the templates of DeepSeek and Phi do, and so fails on missing content.
EVERYTHING = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</s>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|' + m.get('name', '') + '>\n' }}"
    "{% if m.reasoning_content is string and not hide %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<call ' + call.id | default('') + '>' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson + '</call>' }}{% endfor %}"
    "{{ m.tool_call_id | default('') + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOKENIZER = tiny_tokenizer(chat_template=EVERYTHING)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yo"}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"}


def read(columns, *, pads_with_nulls=False):
    """Check a record as load_examples does; return its conversation and ignored keys."""
    record = Record(PLACE, columns, pads_with_nulls)
    ignored = check_records([record]).ignored_keys
    return read_conversation(record), ignored


def rendered(messages, tools=None, **options):
    return TOKENIZER.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def with_turn(**keys):
    """Return a record whose one answer has further or other keys."""
    return {"messages": [USER, {**ANSWER, **keys}]}


def calling(call, **keys):
    """Return a record whose one answer is a call."""
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call], **keys}]}


SAME_AS = [
    # record, the messages and tools that transformers gets, which messages are learned
    ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER], None, [2]),
    ({"messages": [USER, ANSWER], "tools": [TOOL]}, [USER, ANSWER], [TOOL], [1]),
    ({"messages": [USER, ANSWER], "tools": [FUNCTION]}, [USER, ANSWER], [TOOL], [1]),
    ({"messages": [USER, ANSWER], "functions": [FUNCTION]}, [USER, ANSWER], [TOOL], [1]),
    (
        {"messages": [USER, ANSWER], "tools": '[{"name": "f", "strict": null}]'},
        [USER, ANSWER],
        [{"type": "function", "function": {"name": "f", "strict": None}}],
        [1],
    ),
    ({"messages": [USER, ANSWER], "tools": [], "id": None}, [USER, ANSWER], None, [1]),
    ({"messages": [USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER], None, [2]),
    ({"messages": [USER, ANSWER], "system_prompt": "Be brief."}, [SYSTEM, USER, ANSWER], None, [2]),
    (
        {"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."},
        [SYSTEM, USER, ANSWER],
        None,
        [2],
    ),
    ({"messages": [USER, CALLING, RESULT, ANSWER]}, [USER, CALLING, RESULT, ANSWER], None, [1, 3]),
    (calling(CALL, content=None), [USER, CALLING], None, [1]),
    (calling(CALL), [USER, CALLING], None, [1]),
    (calling(CALL, content=[]), [USER, CALLING], None, [1]),
    (calling(CALL, content="So:"), [USER, {**CALLING, "content": "So:"}], None, [1]),
    (calling({"id": "c1", "name": "add", "arguments": '{"a": 1}'}), [USER, CALLING], None, [1]),
    (
        calling({**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}, "index": 0}),
        [USER, CALLING],
        None,
        [1],
    ),  # fmt: skip
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
                {"role": "function", "name": "add", "content": "3"},
                ANSWER,
            ]
        },
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
            },
            {"role": "tool", "name": "add", "content": "3"},
            ANSWER,
        ],
        None,
        [1, 3],
    ),
    (
        with_turn(content=[{"type": "text", "text": "Y"}, {"type": "text", "text": "o"}]),
        [USER, ANSWER],
        None,
        [1],
    ),
    (with_turn(reasoning_content="Hm"), [USER, {**ANSWER, "reasoning_content": "Hm"}], None, [1]),
    (with_turn(thinking=""), [USER, {**ANSWER, "thinking": ""}], None, [1]),
    (with_turn(thinking="Hm"), [USER, {**ANSWER, "thinking": "Hm"}], None, [1]),
    (with_turn(reasoning="Hm", thinking=""), [USER, {**ANSWER, "reasoning": "Hm"}], None, [1]),
    (with_turn(name="Ann"), [USER, {**ANSWER, "name": "Ann"}], None, [1]),
    (with_turn(refusal=None, audio=None, annotations=[], tool_calls=[]), [USER, ANSWER], None, [1]),
    ({"messages": [ANSWER, USER, ANSWER]}, [ANSWER, USER, ANSWER], None, [0, 2]),
    ({"messages": [USER, ANSWER, ANSWER]}, [USER, ANSWER, ANSWER], None, [1, 2]),
    (with_turn(weight=1, train=True, loss=1.0), [USER, ANSWER], None, [1]),
    (with_turn(weight=0), [USER, ANSWER], None, []),
    (with_turn(train=False, weight=0.0), [USER, ANSWER], None, []),
    (with_turn(loss=False), [USER, ANSWER], None, []),
    (
        {"messages": [{**USER, "weight": 0}, {**ANSWER, "training": False}, USER, ANSWER]},
        [USER, ANSWER, USER, ANSWER],
        None,
        [3],
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Yo", "weight": 0},
                {"from": "user", "value": "Hi"},
                {"from": "assistant", "value": "Yo"},
            ],
            "tools": '[{"name": "f"}]',
            "system": "Be brief.",
        },
        [
            SYSTEM,
            USER,
            {**CALLING, "tool_calls": [{"function": CALL["function"]}]},
            {"role": "tool", "content": "3"},
            ANSWER,
            USER,
            ANSWER,
        ],
        [{"type": "function", "function": {"name": "f"}}],
        [2, 6],
    ),
    ({"conversations": [USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER], None, [2]),
    ({"messages": [{"from": "human", "value": "Hi"}, ANSWER]}, [USER, ANSWER], None, [1]),
    (
        {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER], "tools": [TOOL]},
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        [TOOL],
        [4],
    ),
]


@pytest.mark.parametrize(("columns", "messages", "tools", "learned"), SAME_AS)
def test_the_template_gets_what_transformers_would(columns, messages, tools, learned):
    conversation, ignored = read(columns)
    assert rendered(conversation.messages, conversation.tools) == rendered(messages, tools)
    assert [n for n, is_learned in enumerate(conversation.is_learned) if is_learned] == learned
    assert ignored == ()


def test_variables_of_the_template_are_the_records():
    options = {"hide": True}
    columns = {**with_turn(thinking="Hm"), "chat_template_kwargs": options}
    conversation, _ = read(columns)
    expected = rendered([USER, {**ANSWER, "thinking": "Hm"}], hide=True)
    assert "<think>" not in expected
    assert rendered(conversation.messages, **conversation.template_options) == expected


NO_ARGUMENTS = {"name": "stop", "arguments": None}
PADDED = {"name": "add", "arguments": {"a": 1, "b": None, "c": {"d": None}}}


def test_nulls_of_a_typed_table_are_no_keys():
    columns = {
        "messages": [
            {"role": "user", "content": "Hi", "tool_calls": None, "name": None, "weight": None},
            {"role": "assistant", "content": None, "tool_calls": [PADDED, NO_ARGUMENTS]},
        ],
        "chat_template_kwargs": {"hide": 1, "other": None},
        "tools": [{"name": "add", "parameters": {"a": {"type": "string"}, "b": None}}],
    }
    conversation, _ = read(columns, pads_with_nulls=True)
    call, other = conversation.messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"a": 1, "c": {}}
    assert other["function"]["arguments"] == {}
    assert conversation.template_options == {"hide": 1}
    assert conversation.tools[0]["function"]["parameters"] == {"a": {"type": "string"}}
    del columns["messages"][1]["tool_calls"][1]
    conversation, _ = read(columns)
    [call] = conversation.messages[1]["tool_calls"]
    assert call["function"]["arguments"] == PADDED["arguments"]


def test_parquet_gives_the_conversations_it_was_made_of(tmp_path):
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "say", "arguments": {"text": "a"}}}
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    say = {"type": "function", "function": {"name": "say", "parameters": parameters}}
    rows = [
        {"messages": [SYSTEM, USER, CALLING, RESULT, ANSWER], "tools": [TOOL]},
        {"messages": [USER, {**CALLING, "tool_calls": [other]}], "tools": [say]},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": None},
    ]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for record, row in zip(read_records(str(path)), rows, strict=True):
        expected, _ = read(row)
        found = read_conversation(record)
        assert (found.messages, found.tools) == (expected.messages, expected.tools)
        assert found.is_learned == expected.is_learned


def test_nulls_within_json_text_are_values():
    text = '{"name": "add", "arguments": {"a": null}}'
    conversation, _ = read(calling(text), pads_with_nulls=True)
    [call] = conversation.messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"a": None}


IGNORED = [
    ({"messages": [USER, ANSWER], "problem": "Hi ", "solution": "Yo"}, ("problem", "solution")),
    ({"messages": [USER, ANSWER], "prompt": "Hi", "prompt_id": "a1"}, ("prompt", "prompt_id")),
    ({"messages": [USER, ANSWER], "prompt": [USER]}, ("prompt",)),
    ({"messages": [USER, ANSWER], "text": "<s>Hi Yo</s>", "source": "x"}, ("source", "text")),
    (with_turn(id="x", timestamp=3), ("messages.id", "messages.timestamp")),
    ({"conversations": [USER, ANSWER], "id": 3, "model": "m"}, ("id", "model")),
]


@pytest.mark.parametrize(("columns", "keys"), IGNORED)
def test_keys_about_the_example_are_named(columns, keys):
    assert read(columns)[1] == keys


DEEP = {"a": 1}
for _ in range(120):
    DEEP = {"a": DEEP}
REFUSED = [
    ({"messages": "Hi"}, "messages must be a list of at least one role/content object"),
    ({"messages": []}, "messages must be a list of at least one role/content object"),
    ({"messages": [USER, "Hi"]}, "message 2 must be an object with role and content"),
    ({"messages": [{"content": "Hi"}]}, "message 1 must be an object with role and content"),
    ({"messages": [{"role": "user"}]}, "message 1 has no content and no tool calls"),
    (with_turn(content=None), "message 2 has no content and no tool calls"),
    (with_turn(content=3), "content of message 2 must be text, this is a number"),
    (
        with_turn(content="a\ud83d"),
        "content of message 2 holds half a surrogate pair at character 1",
    ),
    (with_turn(role="Assistant"), "role of message 2 is 'Assistant', wanted one of system, "),
    (with_turn(role="model"), "role of message 2 is 'model', wanted one of system, "),
    ({"messages": [USER]}, "messages has no assistant turn, so there is nothing to learn"),
    (
        {"conversations": [{"from": "humann", "value": "Hi"}]},
        "from of message 1 is 'humann', wanted",
    ),
    (
        with_turn(**{"from": "gpt"}),
        "message 2 has from and value beside role and content; drop one",
    ),
    (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "part 1 of message 1 has type 'image_url', but only text is trained on",
    ),
    (
        with_turn(content=[{"type": "text"}]),
        "text of part 1 of message 2 must be text, this is null",
    ),
    (
        with_turn(content=[{"type": "text", "text": "Yo", "image": "x"}]),
        "part 1 of message 2 has the key 'image': only text is trained on",
    ),
    (with_turn(content=["Yo"]), "part 1 of message 2 must be an object with type and text"),
    (
        with_turn(weight=0.5),
        "weight of message 2 is 0.5, wanted 0 or 1 (false or true): a turn is ",
    ),
    (with_turn(train="yes"), "train of message 2 is 'yes', wanted 0 or 1"),
    (with_turn(weight=0, train=True), "weight and train of message 2 contradict each other"),
    (
        {"messages": [{**USER, "train": True}, ANSWER]},
        "train of message 1 asks to learn a turn of the role user, but only assistant turns are",
    ),
    (with_turn(mask=1), "message 2 has the key 'mask': it does not say whether 1 means learned"),
    (with_turn(refusal="No"), "message 2 has the key 'refusal': a refusal is written as content"),
    (
        with_turn(prefix=True),
        "message 2 has the key 'prefix': it is not used here and could change",
    ),
    (with_turn(audio={"id": "x"}), "message 2 has the key 'audio': only text is trained on"),
    (with_turn(thinking="a", reasoning="b"), "thinking and reasoning of message 2 differ"),
    (
        {"messages": [{**USER, "thinking": "a"}, ANSWER]},
        "thinking of message 1: only for the role assistant, this one is user",
    ),
    (
        {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
        "tool_calls of message 1: only for the role assistant, this one is user",
    ),
    (
        with_turn(tool_call_id="c1"),
        "tool_call_id of message 2: only for the role tool, this one is",
    ),
    (calling("add"), "call 1 in tool_calls of message 2 as JSON text: not valid JSON: Expecting "),
    (calling(3), "call 1 in tool_calls of message 2 must be an object, this is 3"),
    (
        calling({"arguments": {}}),
        "name of call 1 in tool_calls of message 2 must be text, this is ",
    ),
    (
        calling({"name": "add"}),
        "arguments of call 1 in tool_calls of message 2 must be an object or the JSON text of one, "
        "this is null",
    ),
    (
        calling({"name": "add", "arguments": "{"}),
        "arguments of call 1 in tool_calls of message 2 as JSON text: not valid JSON: Expecting ",
    ),
    (
        calling({"name": "add", "arguments": "[1]"}),
        "arguments of call 1 in tool_calls of message 2 must be an object or the JSON text of one, "
        "this is '[1]'",
    ),
    (
        calling({"name": "add", "arguments": '{"a": 1, "a": 2}'}),
        "arguments of call 1 in tool_calls of message 2 as JSON text: the key 'a' is given twice",
    ),
    (
        calling({"name": "add", "arguments": '{"a": NaN}'}),
        "arguments of call 1 in tool_calls of message 2 as JSON text: NaN is not a JSON number",
    ),
    (
        calling({"name": "add", "arguments": {"a": float("inf")}}),
        "arguments of call 1 in tool_calls of message 2 holds a number that is not finite",
    ),
    (
        calling({"name": "add", "arguments": {"\udc00": 1}}),
        "a key in arguments of call 1 in tool_calls of message 2 holds half a surrogate pair",
    ),
    (
        calling({"name": "add", "arguments": DEEP}),
        "arguments of call 1 in tool_calls of message 2 is nested more than 100 deep",
    ),
    (
        calling({"name": "add", "parameters": {"a": 1}, "arguments": {}}),
        "call 1 in tool_calls of message 2 has the key 'parameters': it is not used here",
    ),
    (
        calling({"function": {"name": "add", "arguments": {}, "strict": True}}),
        "function of call 1 in tool_calls of message 2 has the key 'strict': it is not used here",
    ),
    (
        calling({"type": "custom", "function": {"name": "a"}}),
        "call 1 in tool_calls of message 2 has type 'custom', wanted 'function'",
    ),
    (
        {**calling(CALL), "messages": [USER, {**CALLING, "function_call": CALL["function"]}]},
        "message 2 has tool_calls and function_call; drop function_call",
    ),
    ({"messages": [USER, ANSWER], "tools": "x"}, "tools as JSON text: not valid JSON: Expecting"),
    ({"messages": [USER, ANSWER], "tools": [3]}, "tool 1 must be an object, this is 3"),
    (
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": {"a": "\ud800"}}]},
        "tools holds half a surrogate pair at character 0",
    ),
    ({"messages": [USER, ANSWER], "tools": 3}, "tools must be a list of objects, this is 3"),
    (
        {"messages": [USER, ANSWER], "tools": [{"type": "web_search"}]},
        "name of tool 1 must be text, this is null",
    ),
    (
        {"messages": [USER, ANSWER], "tools": [TOOL], "functions": [FUNCTION]},
        "tools and functions are both given; drop functions",
    ),
    (
        {"messages": [SYSTEM, USER, ANSWER], "system": "Other"},
        "system differs from the first message, which is a system's",
    ),
    (
        {"messages": [USER, ANSWER], "prompt": "Ho"},
        "a record of messages has the key 'prompt': two descriptions of one example",
    ),
    (
        {"messages": [USER, ANSWER], "problem": "Hi, Ann"},
        "a record of messages has the key 'problem': it is not used here and could change",
    ),
    (
        {"messages": [USER, ANSWER], "chosen": "Yo"},
        "a record of messages has the key 'chosen': preference pairs are not trained on",
    ),
    (
        {"messages": [USER, ANSWER], "text": "Hi, Ann"},
        "a record of messages has the key 'text': it is not a rendering of the rest",
    ),
    (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs sets tokenize, which is not a record's to set",
    ),
    (
        {"messages": [USER, ANSWER], "chat_template_kwargs": [1]},
        "chat_template_kwargs must be an object, this is a list of 1",
    ),
    (
        {"prompt": [USER], "completion": "Yo"},
        "completion must be a list of at least one role/content object",
    ),
    (
        {"prompt": [USER, ANSWER], "completion": [USER]},
        "completion has no assistant turn, so there is nothing to learn",
    ),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED)
def test_what_cannot_be_learned_as_meant_is_one_sentence(columns, message):
    with pytest.raises(DataError) as caught:
        read(columns)
    assert str(caught.value).startswith(f"{PLACE}: {message}")
    assert "\n" not in str(caught.value)


UNREAD = [
    ({"messages": [USER, ANSWER], "tools": [TOOL]}, "tools"),
    (calling(CALL), "tool_calls"),
    (with_turn(reasoning="Hm"), "reasoning"),
    (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"hide": 1}},
        "chat_template_kwargs' hide",
    ),
]


@pytest.mark.parametrize(("columns", "what"), UNREAD)
def test_a_template_that_never_reads_what_a_record_has_is_refused(columns, what):
    record = Record(PLACE, columns)
    check_template_reads(read(columns)[0], EVERYTHING)
    with pytest.raises(DataError) as caught:
        find_format(record).encode([record], tiny_tokenizer(chat_template=CHATML))
    assert str(caught.value).startswith(f"{PLACE}: the record has {what}, which the tokenizer's")
