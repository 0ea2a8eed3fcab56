"""A byte-level BPE tokenizer trained on the spot, whose end token is also its padding token."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megablocks_utils.training.data.alpaca import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT

BEGIN, END = "<s>", "</s>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template without marks: turns end in ``</s>`` and a line break."""


@cache
def _trained() -> str:
    """Return the tokenizer's JSON (each caller gets a copy of its own)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, adds_bos: bool = False, chat_template: str | None = CHATML):
    """Build a tokenizer of 400 tokens, ``<s>`` = 0 and ``</s>`` = 1 = padding."""
    tokenizer = Tokenizer.from_str(_trained())
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END
    )
    wrapped.chat_template = chat_template
    return wrapped
