"""Structured output: which tokens a grammar of JSON allows behind a path, by llguidance (the extra `structured`).

llguidance refuses what it does not know of a schema, and needs nothing but itself.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

_KEPT = 64  # compiled guides of a tokenizer
# JSON may have any white space between its tokens, and small models then write nothing else: a line break and an
# indentation are enough.
OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,24}", "lenient": False}


@dataclass(frozen=True, slots=True)
class Guide:
    """What an answer has to be: a JSON text that its schema allows, and nothing else.

    schema: a JSON Schema as JSON text; properties are written in its order. By default any object.
    """

    schema: str = '{"type": "object"}'

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Guide:
        """OpenAI's `response_format` of type `json_schema`. ValueError for what is no schema at all."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the JSON schema is not JSON: {error}.") from error
        if not isinstance(parsed, Mapping):
            raise ValueError(f"a JSON schema is an object, not {text[:40]}.")
        return cls(text)


class Grammar:
    """A guide compiled for a tokenizer and a model's vocabulary; requests share it.

    schema: the guide's. vocabulary: tokens that the model writes. end_ids: those that end a text which is complete.
    tokenizer_size: tokens that the tokenizer has, at least as many.
    """

    def __init__(
        self, schema: str, matcher: Any, vocabulary: int, end_ids: Collection[int], tokenizer_size: int
    ) -> None:
        self.schema, self._matcher, self._tokenizer_size = schema, matcher, tokenizer_size
        self.vocabulary, self.end_ids = vocabulary, frozenset(end_ids)

    @property
    def words(self) -> int:
        """int32 words of a mask, 32 tokens each."""
        return -(-self.vocabulary // 32)

    def matcher(self) -> Any:
        """An `LLMatcher` that has read nothing yet."""
        return self._matcher.deep_copy()

    def fill(self, matcher: Any, mask: np.ndarray) -> None:
        """Writes to `mask` (int32 [words]) what a matcher allows next."""
        from llguidance.numpy import fill_next_token_bitmask

        whole = np.zeros((1, -(-self._tokenizer_size // 32)), dtype=np.int32)
        fill_next_token_bitmask(matcher, whole)
        mask[:] = whole[0, : len(mask)]


class GuideLogitsProcessor(LogitsProcessor):
    """Bans tokens that a grammar forbids behind a path; of the prompt's `prompt_length` tokens it knows nothing.

    It goes by the ids that it is given. What it keeps between calls is where its parser stands, which it moves to
    whatever path is asked for; that is quick for one that goes on. One thread at a time may ask.
    """

    def __init__(self, grammar: Grammar, prompt_length: int) -> None:
        self.grammar, self.prompt_length = grammar, prompt_length
        self._matcher = grammar.matcher()
        self._read: list[int] = []  # by the matcher

    def masks(self, path: Sequence[int], tokens: Sequence[int] = (), parents: Sequence[int] = ()) -> np.ndarray:
        """int32 [1 + n, words]: what is allowed behind a path, prompt included, and behind each draft node below it.

        tokens, parents: of each of n draft nodes, its token and the node above, -1 for the path. Behind what is
        forbidden, and behind an end token, all bits are 1. ValueError where the path itself breaks the grammar, or is
        too much for its parser.
        """
        written = list(path[self.prompt_length :])
        masks = np.full((1 + len(tokens), self.grammar.words), -1, dtype=np.int32)
        if self._fill(written, masks[0]) is False:
            raise ValueError("the guide cannot follow the text: it does not keep to the schema.")
        above: list[list[int] | None] = [written]
        for row, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1):
            before, mask = above[1 + parent], masks[1 + parent]
            if before is None or not 0 <= token < self.grammar.vocabulary or not _has(mask, token):
                above.append(None)
                continue
            above.append([*before, token])
            self._fill([*before, token], masks[row])
        return masks

    def expected(self, path: Sequence[int]) -> list[int]:
        """Tokens that come next if the schema leaves no choice of text, as its tokenizer would write them; other tokens
        may make the same text."""
        written = list(path[self.prompt_length :])
        try:
            if self.grammar.end_ids.isdisjoint(written) and self._move(written):
                forced = self._matcher.compute_ff_tokens()
                return list(takewhile(lambda token: token < self.grammar.vocabulary, forced))
        except ValueError:  # which the next masks will say
            pass
        return []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` long [rows, length], `scores` [rows, vocab]; returns new scores.

        Behind a path that breaks the grammar they stay as they are: drafts that are not accepted are asked for, too.
        """
        scores, mask = scores.clone(), np.full(self.grammar.words, -1, dtype=np.int32)
        for row, path in enumerate(input_ids.tolist()):
            if self._fill(path[self.prompt_length :], mask):
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: scores.shape[1]]
                scores[row, torch.from_numpy(bits == 0).to(scores.device)] = -torch.inf
        return scores

    def _fill(self, written: list[int], mask: np.ndarray) -> bool | None:
        """Writes to `mask` (int32 [words]) what is allowed behind these tokens. Nothing is written behind an end token
        (None), and where they break the grammar (False)."""
        if not self.grammar.end_ids.isdisjoint(written):
            return None
        if not self._move(written):
            return False
        self.grammar.fill(self._matcher, mask)
        self._check()
        return True

    def _move(self, written: list[int]) -> bool:
        """Has the matcher stand behind these tokens; where they break the grammar it stands behind some of them."""
        known = len(self._read)
        if self._read != written[:known]:
            pairs = enumerate(zip(self._read, written, strict=False))
            known = next((place for place, (old, new) in pairs if old != new), min(known, len(written)))
            self._matcher.rollback(len(self._read) - known)
        new = written[known:]
        taken = self._matcher.try_consume_tokens(new) if new else 0
        self._read = written[: known + taken]
        self._check()
        return taken == len(new)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the guide cannot follow the text: {_first_line(self._matcher.get_error())}")


class _Compiler:
    """Compiles guides for a tokenizer, and keeps those that were asked for last."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: tuple[int, ...]) -> None:
        import llguidance.hf

        self._vocabulary, self._end_ids = vocabulary, end_ids
        self._size = max(vocabulary, len(tokenizer))
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=self._size, eos_token=list(end_ids))
        except ValueError as error:
            raise ValueError(f"structured output cannot read this tokenizer: {_first_line(str(error))}") from error
        self._made: OrderedDict[Guide, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, guide: Guide) -> Grammar:
        with self._lock:
            if guide not in self._made:
                self._made[guide] = self._compile(guide)
            self._made.move_to_end(guide)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return self._made[guide]

    def _compile(self, guide: Guide) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        grammar = LLMatcher.grammar_from_json_schema(guide.schema, overrides=OPTIONS)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise ValueError(f"the JSON schema is not supported: {_first_line(matcher.get_error())}")
        return Grammar(guide.schema, matcher, self._vocabulary, self._end_ids, self._size)


_compilers: weakref.WeakKeyDictionary[Any, dict[tuple, _Compiler]] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()


def compiled(guide: Guide, tokenizer: Any, vocabulary: int, end_ids: Collection[int]) -> Grammar:
    """A guide's grammar; a schema, and a tokenizer, that was asked for before is at hand.

    A tokenizer takes a second or so, a schema milliseconds: a server asks in a thread of its own.

    Args:
        tokenizer: a fast one of transformers'.
        vocabulary: tokens that the model writes.
        end_ids: those that end an answer, at least one.

    Raises ValueError, in a sentence, for a schema that is not supported, and where llguidance is missing.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise ValueError("structured output needs llguidance: pip install 'medusa-apar[structured]'.") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("structured output needs a fast tokenizer: pass tokenizer=... to attach.")
    if not end_ids:
        raise ValueError("structured output needs an end token, and the model has none.")
    key = vocabulary, tuple(sorted(end_ids))
    with _compilers_lock:
        known = _compilers.setdefault(tokenizer, {})
        if key not in known:
            known[key] = _Compiler(tokenizer, *key)
    return known[key](guide)


def _has(mask: np.ndarray, token: int) -> bool:
    return bool(int(mask[token // 32]) >> (token % 32) & 1)


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["it does not say why"]
    return lines[0].strip()[:200].rstrip(".") + "."
