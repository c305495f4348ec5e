"""The text of an answer as its tokens come: no character is ever cut, and it ends where a stop string begins.

A text depends on its tokens alone, not on how many of them come at once. So what is streamed adds up to what is
answered in one piece, byte for byte, and an engine that looks for stop strings finds them where a reader does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, Protocol

from tokenizers import decoders

_UNKNOWN = "\ufffd"
_BEGUN = 3  # tokens that can be the beginning of a character, a byte each
_HELD = 8  # tokens without text, beyond which those that can be no beginning are waited for no more
_SPLIT = re.compile(r"([A-Z]\w+)\(")
_KEEPS_ALL = {"Sequence", "ByteLevel", "Split", "Digits", "Regex", "String"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(Protocol):
    """Tokens to text, one at a time."""

    def push(self, token: int) -> str:
        """What can be read now and could not before; the beginning of a character cannot."""

    def end(self) -> str:
        """What is left: a character that no further token completes."""


class TokenTexts:
    """What the tokens of a tokenizer are as text. Special tokens are no text.

    Where the tokenizer is byte-level, as most are, the text is exactly `tokenizer.decode` of all tokens at once. With
    others a token is decoded behind the tokens before it, so that it keeps its leading space, and bytes are held until
    they are a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if isinstance(getattr(backend, "decoder", None), decoders.ByteLevel) else None
        added = {} if backend is None else backend.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special}
        self._special = set(tokenizer.all_special_ids) if backend is None else special
        self._bytes: dict[int, bytes] = {}

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, tokenizer: Any) -> TokenTexts:
        """The tokenizer's own; kept for those that were asked for last."""
        return cls(tokenizer)

    def decoder(self) -> Decoder:
        return _Windows(self.decode, self._special) if self._backend is None else _Bytes(self._shown)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def least_tokens(self, text: str) -> int:
        """At least so many tokens the text has; 0 where that cannot be known without tokenizing it."""
        longest, missing = self._longest
        if not longest:
            return 0
        return -(-len(text.encode().translate(None, missing)) // longest)

    @cached_property
    def _longest(self) -> tuple[int, bytes]:
        """Bytes of the longest token, and those of which there is no token, which may be left out of a text.

        0 where a token may stand for more than its bytes: where the text is changed before it is tokenized, or a part
        of it left out, or an added token takes in the spaces beside it, or the tokenizer is not byte-level.
        """
        if self._backend is None or self._backend.normalizer is not None:
            return 0, b""
        split = repr(self._backend.pre_tokenizer)
        if not set(_SPLIT.findall(split)) <= _KEEPS_ALL or "Removed" in split:
            return 0, b""
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return 0, b""
        names = self._backend.get_vocab()
        table = _byte_of_character()
        missing = bytes(byte for character, byte in table.items() if character not in names)
        return max(len(name.encode()) for name in names), missing

    def bytes_of(self, token: int) -> bytes:
        """The token's own bytes, perhaps a part of a character; of a special token its name; of none that the
        tokenizer knows nothing."""
        if token not in self._bytes:
            self._bytes[token] = self._look_up(token)
        return self._bytes[token]

    def _shown(self, token: int) -> bytes:
        return b"" if token in self._special else self.bytes_of(token)

    def _look_up(self, token: int) -> bytes:
        if self._backend is None:
            return _piece_bytes(self._tokenizer.convert_ids_to_tokens([token])[0])
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        table = _byte_of_character()
        known = [table.get(character) for character in name]
        # As the byte-level decoder has it: a name with any other character stands for itself.
        return name.encode() if None in known else bytes(byte for byte in known if byte is not None)


class StopString(str):
    """A string that many texts look for: what a search has to know of it is found out once."""

    @cached_property
    def shorter(self) -> list[int]:
        """How long the longest text is with which each beginning both begins and ends, the beginning itself apart."""
        found = [0]
        for character in self[1:]:
            length = found[-1]
            while length and self[length] != character:
                length = found[length - 1]
            found.append(length + (self[length] == character))
        return found


class TextStream:
    """The text of one answer.

    Args:
        texts: of the answer's tokenizer.
        stops: strings before which the text ends, none of them empty. The one that ends first counts, and of two that
            end with the same character the longer one. What may become one is held back until that is known. Where
            many texts have the same ones, make them `StopString`s.
        free: no stop string ends within so many tokens from the first.

    Attributes:
        length: characters that can be read, a stop string and what is held back included.
        stopped: whether a stop string was found. Nothing is text from then on.
    """

    def __init__(self, texts: TokenTexts, stops: Sequence[str] = (), free: int = 0) -> None:
        self.length, self.stopped = 0, False
        self._decoder, self._free = texts.decoder(), free
        self._searches, self._held = [_Search(stop) for stop in stops], ""

    def push(self, token: int) -> str:
        """What a token adds to the text that is final."""
        if self.stopped:
            return ""
        text = self._decoder.push(token)
        self._free -= 1
        return self._take(text, self._free < 0)

    def end(self) -> str:
        """What is left, now that no token follows."""
        if self.stopped:
            return ""
        shown = self._take(self._decoder.end(), self._free < 0)
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _take(self, text: str, may_stop: bool) -> str:
        self.length += len(text)
        if not self._searches:
            return text
        held, self._held = self._held + text, ""
        for end in range(len(held) - len(text), len(held)):
            found = max(search.push(held[end]) for search in self._searches)
            if found and may_stop:
                self.stopped = True
                return held[: end + 1 - found]
        kept = len(held) - max(search.matched for search in self._searches)
        self._held = held[kept:]
        return held[:kept]


class _Search:
    """Knuth, Morris and Pratt's, for one string. matched: how much of it the text so far ends with."""

    def __init__(self, wanted: str) -> None:
        stop = wanted if isinstance(wanted, StopString) else StopString(wanted)
        self._wanted, self._shorter, self.matched = stop, stop.shorter, 0

    def push(self, character: str) -> int:
        """The string's length where it ends with this character, else 0."""
        while self.matched and self._wanted[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self._wanted[self.matched] == character
        if self.matched < len(self._wanted):
            return 0
        self.matched = self._shorter[-1]
        return len(self._wanted)


class _Bytes:
    """A byte-level tokenizer's decoder joins all bytes and reads them as UTF-8; this one does so byte by byte."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of, self._inner = bytes_of, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._inner.decode(self._bytes_of(token))

    def end(self) -> str:
        return self._inner.decode(b"", True)


class _Windows:
    """Any tokenizer's new tokens are decoded behind those that last showed something.

    So a token costs no more than a few others do, whatever came before it: special tokens, which are no text, are left
    out, and a run of tokens that end in no whole character is shown but for those that may be the beginning of one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], special: Collection[int]) -> None:
        self._decode, self._special, self._ids, self._read = decode, special, list[int](), 0

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        self._ids.append(token)
        new = self._new(len(self._ids))
        if new and not new.endswith(_UNKNOWN):
            return self._shown(new, len(self._ids))
        if len(self._ids) - self._read > _HELD:
            whole = len(self._ids) - _BEGUN
            return self._shown(self._new(whole), whole)
        return ""

    def end(self) -> str:
        new, self._ids, self._read = self._new(len(self._ids)), [], 0
        return new

    def _new(self, end: int) -> str:
        """What the tokens up to there add."""
        return self._decode(self._ids[:end])[len(self._decode(self._ids[: self._read])) :]

    def _shown(self, new: str, end: int) -> str:
        """Keeps the tokens that have just been shown as what the next ones stand behind."""
        del self._ids[: self._read]
        self._read = end - self._read
        return new


def _piece_bytes(piece: str | None) -> bytes:
    """What a SentencePiece token stands for."""
    byte = _BYTE_TOKEN.fullmatch(piece or "")
    return bytes([int(byte[1], 16)]) if byte else (piece or "").replace("\u2581", " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table, by which byte-level tokenizers write bytes as characters that can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + index): byte for index, byte in enumerate(unseen)}
