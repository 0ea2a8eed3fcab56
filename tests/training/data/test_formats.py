"""Token layouts of the text formats, written by hand."""

import pytest

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.alpaca import alpaca_prompt
from megablocks_utils.training.data.formats import check_records, find_format
from megablocks_utils.training.data.sources import Record
from tests.support.tiny_tokenizer import tiny_tokenizer

BOS, EOS = 0, 1


def encode(columns, tokenizer, place="data.json:1"):
    """Check and encode one record as load_examples does."""
    record = Record(place, columns)
    data_format = find_format(record)
    data_format.check(record)
    return data_format.encode([record], tokenizer)[0]


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_alpaca_prompts_are_stanfords():
    assert alpaca_prompt("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    without = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {1}.\n\n### Response:"
    )
    assert alpaca_prompt("Add {1}.") == without
    assert alpaca_prompt("Add {1}.", "") == without


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}, {"input": "1 and 2"}])
def test_instruction_learns_the_answer_and_its_end_token(adds_bos, extra):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    ids, labels = encode({"instruction": "Add.", "output": "Three, of course", **extra}, tokenizer)
    prompt = [BOS] * adds_bos + plain(tokenizer, alpaca_prompt("Add.", extra.get("input")))
    answer = [*plain(tokenizer, "Three, of course"), EOS]
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer


def test_an_end_or_begin_token_in_the_text_is_not_doubled():
    tokenizer = tiny_tokenizer(adds_bos=True)
    ids, labels = encode({"output": "<s>a ### Response: b</s>"}, tokenizer)
    answer = [*plain(tokenizer, " b"), EOS]
    assert ids == [BOS, *plain(tokenizer, "a ### Response:"), *answer]
    assert labels[-len(answer) :] == answer
    assert ids.count(BOS) == 1 and ids.count(EOS) == 1


def test_an_empty_answer_teaches_the_end_token():
    tokenizer = tiny_tokenizer()
    ids, labels = encode({"instruction": "Say nothing.", "output": ""}, tokenizer)
    assert [label for label in labels if label != -100] == [EOS]
    assert labels[-1] == EOS == ids[-1]


def test_finished_text_learns_what_follows_the_last_marker():
    tokenizer = tiny_tokenizer()
    text = "### Response: is a heading.\n\n### Response:\nYes."
    ids, labels = encode({"output": text}, tokenizer)
    prompt = plain(tokenizer, "### Response: is a heading.\n\n### Response:")
    answer = [*plain(tokenizer, "\nYes."), EOS]
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer


def test_both_ways_to_write_an_alpaca_record_give_the_same_tokens():
    tokenizer = tiny_tokenizer()
    text = alpaca_prompt("Add.", "1 and 2") + "Three"
    columns = {"instruction": "Add.", "input": "1 and 2", "output": "Three"}
    assert encode({"output": text}, tokenizer) == encode(columns, tokenizer)


HISTORY = [["Add 1.", "One"], ["Add 2.", "Three"]]
ALPACA_TEXTS = [
    # what LlamaFactory's `alpaca` template writes (its prompts end in a line break, ours do not)
    (
        {"system": "Be brief."},
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:Six</s>",
        ["Six</s>"],
    ),
    (
        {"history": HISTORY},
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd 1.\n\n### Response:One</s>\n\n"
        "### Instruction:\nAdd 2.\n\n### Response:Three</s>\n\n"
        "### Instruction:\nAdd.\n\n### Response:Six</s>",
        ["One</s>", "Three</s>", "Six</s>"],
    ),
    (
        {"system_prompt": "Be brief.", "history": HISTORY[:1], "input": "{3}"},
        "Be brief.\n\n### Instruction:\nAdd 1.\n\n### Response:One</s>\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n{3}\n\n### Response:Six</s>",
        ["One</s>", "Six</s>"],
    ),
]


@pytest.mark.parametrize(("extra", "text", "learned"), ALPACA_TEXTS)
def test_system_and_history_are_written_in_alpacas_form(extra, text, learned):
    tokenizer = tiny_tokenizer()
    ids, labels = encode({"instruction": "Add.", "output": "Six", **extra}, tokenizer)
    assert tokenizer.decode(ids) == text
    assert ids == plain(tokenizer, text)
    answers = "".join(tokenizer.decode([t]) if t != -100 else "|" for t in labels)
    assert [answer for answer in answers.split("|") if answer] == learned


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_completion_is_learned_after_its_prompt(adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    ids, labels = encode({"prompt": "One and two is", "completion": " three."}, tokenizer)
    assert ids == [BOS] * adds_bos + [*plain(tokenizer, "One and two is three."), EOS]
    assert [label for label in labels if label != -100] == [*plain(tokenizer, " three."), EOS]


def test_the_rendering_beside_an_alpaca_record_is_ignored_by_name():
    text = alpaca_prompt("Add.", "1") + " Two"
    columns = {"instruction": "Add.", "input": "1", "output": "Two", "text": text, "prompt": text}
    assert check_records([Record("x:1", columns)]).ignored_keys == ("prompt", "text")


def test_the_fuller_description_wins():
    names = {
        "instruction and output": {"instruction": "", "output": "", "text": "", "input": ""},
        "messages": {"messages": [], "output": ""},
        "input_ids and labels": {"output": "", "input_ids": [], "labels": []},
        "output alone": {"output": "", "labels": []},
    }
    for name, columns in names.items():
        assert find_format(Record("x:1", columns)).name == name


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError) as caught:
        encode({"instruction": "a", "output": "b"}, tokenizer)
    assert str(caught.value) == (
        "the model's tokenizer has no end token (eos_token), which answers need"
    )


WRONG = [
    (
        {"prompt": "a", "text": "b"},
        (
            "d.json:3: no known columns: found prompt, text; wanted instruction and output (input "
            "optional), output alone, messages, conversations, prompt and completion, or "
            "input_ids and labels"
        ),
    ),
    (
        {},
        (
            "d.json:3: no known columns: found none; wanted instruction and output (input "
            "optional), output alone, messages, conversations, prompt and completion, or "
            "input_ids and labels"
        ),
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "d.json:3: a record with chosen and rejected: preference pairs are not trained on: give "
        "the wanted answer alone",
    ),
    (
        {"data": [{"output": "a"}]},
        "d.json:3: one object that holds records under 'data'; wanted the list alone",
    ),
    ({"prompt": "a", "completion": None}, "d.json:3: completion must be text, this is null"),
    (
        {"instruction": "", "output": "", "history": [["a"]]},
        "d.json:3: pair 1 of history must be [question, answer], this is a list of 1",
    ),
    (
        {"instruction": "", "output": "", "history": [["a", None]]},
        "d.json:3: the answer in pair 1 of history must be text, this is null",
    ),
    (
        {"instruction": "", "output": "", "history": "a"},
        "d.json:3: history must be a list of [question, answer] pairs, this is 'a'",
    ),
    (
        {"instruction": "", "output": "", "system": "a", "system_prompt": "b"},
        "d.json:3: system and system_prompt differ; drop one",
    ),
    (
        {"instruction": "Add.", "output": "Two", "text": "Add. Three"},
        "d.json:3: a record of instruction and output has the key 'text': it is not a rendering of "
        "the rest; drop it",
    ),
    (
        {"output": "no marker"},
        "d.json:3: output has no '### Response:', so it is unknown where the answer begins",
    ),
    ({"output": 3}, "d.json:3: output must be text, this is a number"),
    ({"instruction": None, "output": ""}, "d.json:3: instruction must be text, this is null"),
    ({"instruction": "", "output": ["a"]}, "d.json:3: output must be text, this is a list"),
    (
        {"instruction": "", "output": "", "input": 5},
        "d.json:3: input must be text, this is a number",
    ),
    (
        {"instruction": "ab\ud83d", "output": ""},
        "d.json:3: instruction holds half a surrogate pair at character 2",
    ),
    (
        {"input_ids": [1, 2, 3], "labels": [1, 2]},
        "d.json:3: input_ids has 3 items and labels has 2, they must be equally long",
    ),
    (
        {"input_ids": [1, 2.5], "labels": [1, 2]},
        "d.json:3: input_ids must be a list of whole numbers",
    ),
    (
        {"input_ids": [1, 2], "labels": [1, True]},
        "d.json:3: labels must be a list of whole numbers",
    ),
    ({"input_ids": "12", "labels": [1]}, "d.json:3: input_ids must be a list of whole numbers"),
    ({"input_ids": [1, -2], "labels": [1, 2]}, "d.json:3: input_ids holds the negative token -2"),
    (
        {"input_ids": [1, 2], "labels": [-100, -1]},
        "d.json:3: labels must be tokens or -100, this one holds -1",
    ),
]


@pytest.mark.parametrize(("columns", "message"), WRONG)
def test_a_bad_record_is_named_with_its_place(columns, message):
    with pytest.raises(DataError) as caught:
        encode(columns, tiny_tokenizer(), place="d.json:3")
    assert str(caught.value) == message
