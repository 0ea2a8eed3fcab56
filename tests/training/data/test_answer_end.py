"""What ends an answer, by the data, the tokenizer and the generation config."""

import numpy as np
import pytest
from transformers import GenerationConfig

from megablocks_utils.config import DataConfig
from megablocks_utils.training.data.answer_end import find_answer_end
from megablocks_utils.training.data.examples import load_examples
from tests.support import chat_templates as like
from tests.support.tiny_tokenizer import CHATML, tiny_tokenizer

BEGIN, END, TURN_END = 0, 1, 361
CHAT = (
    '[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}, '
    '{"role": "user", "content": "So"}, {"role": "assistant", "content": "B"}]}]'
)


def find(tmp_path, template, generation_ends, *, limit=4096, data=CHAT):
    path = tmp_path / "chat.json"
    path.write_text(data)
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == TURN_END
    examples = load_examples(DataConfig((str(path),), max_seq_length=limit), tokenizer)
    generation = GenerationConfig(eos_token_id=generation_ends)
    end = find_answer_end(examples, tokenizer, generation, max_seq_length=limit)
    end.apply_to(generation)
    return end, generation.eos_token_id


@pytest.mark.parametrize("ends", [END, [END], [BEGIN, END]])
def test_nothing_is_said_or_changed_where_all_agree(tmp_path, ends):
    end, saved = find(tmp_path, CHATML, ends)
    assert (end.warning, saved) == (None, ends)
    assert end.as_record()["learned"] == [END]
    data = '[{"instruction": "a", "output": "b"}]'
    assert find(tmp_path, None, END, data=data)[0].warning is None


def test_generation_is_saved_to_stop_at_what_is_learned(tmp_path):
    im_end = CHATML.replace("</s>", "<|im_end|>")
    end, saved = find(tmp_path, im_end, END)
    assert saved == [END, TURN_END] == end.as_record()["generation_config"]
    assert end.warning == (
        "answers end with <|im_end|> (361), but the tokenizer's eos_token is </s> (1) and the "
        "generation config's eos_token_id is </s> (1); the generation config is saved as </s> (1) "
        "or <|im_end|> (361)"
    )
    end, saved = find(tmp_path, im_end, None)
    assert saved == TURN_END
    assert "the generation config's eos_token_id is not set" in end.warning


def test_a_tokenizer_that_names_another_end_is_named_though_generation_stops(tmp_path):
    end, saved = find(tmp_path, CHATML.replace("</s>", "<|im_end|>"), [END, TURN_END])
    assert saved == [END, TURN_END]
    assert end.warning.endswith("; the generation config is right as it is")
    assert "eos_token is </s> (1)" in end.warning


@pytest.mark.parametrize("template", [like.NO_END, like.NO_END.replace("+ '\n' }}", "}}")])
def test_a_template_that_ends_no_turn_is_named(tmp_path, template):
    end, saved = find(tmp_path, template, END)
    assert saved == END
    assert end.warning == (
        "1 of 1 answers end with a token of their text and none that ends a turn, so the model "
        "does not learn to stop; the chat template must write one (--chat_template)"
    )


def test_examples_that_lost_their_end_say_nothing(tmp_path):
    end, saved = find(tmp_path, CHATML, END, limit=40)
    assert (end.num_examples, end.warning, saved) == (0, None, END)


def test_each_end_of_a_conversation_in_parts_counts(tmp_path):
    end, saved = find(tmp_path, like.ENDS_ONLY_LAST.replace("</s>", "<|im_end|>"), END)
    assert (end.num_examples, saved) == (2, [END, TURN_END])


def test_only_so_many_examples_are_looked_at():
    class Examples:
        lengths = np.full(100_000, 3)
        num_read = 0

        def __getitem__(self, index):
            self.num_read += 1
            return np.array([5, 6, 1]), np.array([-100, 6, 1])

    examples = Examples()
    end = find_answer_end(examples, tiny_tokenizer(), None, max_seq_length=10)
    assert end.num_examples == examples.num_read == 1000
    assert end.learned == (1,)
