"""Tokenizers of the kinds that models have, each of a few dozen tokens."""

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
KINDS = ("byte_level", "byte_level_trimmed", "metaspace_always", "metaspace_first")
KINDS += ("metaspace_never", "llama2", "word_piece")
TEXTS = [
    "### Response: Three of course, hello you; user and assistant say it.\n\nOne word more.",
    "Below is an instruction that describes a task.\n[INST] Hi [/INST] Hello there",
] * 3


def _byte_level(*, trims: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BEGIN, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=90,
        special_tokens=[BEGIN, END, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _llama2() -> Tokenizer:
    """Build SentencePiece's BPE as Llama 2 and Mixtral have it: one word, bytes for the rest."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[BEGIN, END, UNKNOWN, *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=[BEGIN, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def _trained(kind: str) -> str:
    if kind.startswith("metaspace"):
        return _metaspace(kind.removeprefix("metaspace_")).to_str()
    if kind.startswith("byte_level"):
        return _byte_level(trims=kind.endswith("trimmed")).to_str()
    return {"llama2": _llama2, "word_piece": _word_piece}[kind]().to_str()


def build_tokenizer(kind: str, **added: AddedToken) -> PreTrainedTokenizerFast:
    """Build a tokenizer of a kind, with special tokens that templates write."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    tokenizer.add_special_tokens([*added.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN
    )
