"""Tiny tokenizers."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.models import VOCAB


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one character per id: what the tiny models write is text."""
    characters = [*string.ascii_letters, "Ġ", ".", ",", "0"]
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<fork>", "<child>", *characters])
    }
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert len(vocabulary) == VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


WORDS = ["<unk>", "<s>", "</s>", "<fork>", "<child>", *(f"w{i}" for i in range(27))]


def save_tokenizer(folder, words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)


TITLES, LIST_WORDS = (
    [f" {kind}{letter}" for letter in string.ascii_lowercase[:count]] for kind, count in (("T", 12), ("w", 24))
)

# Some pieces hold a mark and the line break behind it, as those of Llama 3 and Qwen do.
PIECES = ["<pad>", "<s>", "</s>", "<fork>", "<child>", "\n", "\n\n", ".", "a", ":", ":\n", "  ", "-", " -", ".\n"]
PIECES += [*map(str, range(10)), *TITLES, *LIST_WORDS]
ID = {piece: index for index, piece in enumerate(PIECES)}
assert len(PIECES) == VOCAB


class ListTokenizer:
    """The longest piece first."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
            ids.append(ID[piece])
            text = text[len(piece) :]
        return ids

    def decode(self, ids: list[int], **options) -> str:
        return "".join(PIECES[index] for index in ids)


def json_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pieces of JSON, some of them of two tokens of its grammar or with a part of one."""
    merges = [('"', ":"), ("{", '"'), ('"', ","), ("t", "r"), ("u", "e"), ("tr", "ue"), ("1", "2"), ("a", "b")]
    pieces = [*'{}[]":,-.', *string.digits, *string.ascii_lowercase, "Ġ", "Ċ", *map("".join, merges), "Z"]
    vocabulary = {piece: id for id, piece in enumerate(["<pad>", "<s>", "</s>", "<fork>", "<child>", *pieces])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<s>", "</s>", "<fork>", "<child>"])
    assert len(vocabulary) == VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
