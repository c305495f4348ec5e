"""What each token adds to the text."""

from __future__ import annotations

from typing import Any

from medusa_apar.threads.paragraph_tree import Thread

# Tokens before a token that are decoded with it: by itself one may lose its leading space, or be half of a character.
_CONTEXT = 6


class Pieces:
    """Texts of threads' tokens, kept and extended as threads grow."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._texts: dict[Thread, list[str]] = {}

    def of(self, thread: Thread) -> list[str]:
        """One text for each of the thread's own tokens; what takes several tokens stands at the last of them."""
        texts = self._texts.setdefault(thread, [])
        own = thread.token_ids
        if len(texts) < len(own):
            before = [*thread.path_ids[-_CONTEXT:], *own[: len(texts)]]
            texts += self._decoded(before, own[len(texts) :], _unread(texts))
        return texts

    def at(self, thread: Thread, place: int, token_ids: list[int]) -> list[str]:
        """The texts of tokens that might have been the thread's own from a place on."""
        texts = self.of(thread)[:place]
        return self._decoded([*thread.path_ids[-_CONTEXT:], *thread.token_ids[:place]], token_ids, _unread(texts))

    def alone(self, token: int) -> str:
        return f"⟨{token}⟩" if self._tokenizer is None else self._tokenizer.decode([token])

    def _decoded(self, before: list[int], token_ids: list[int], unread: int) -> list[str]:
        """unread: how many tokens at the end of `before` have shown no text yet."""
        if self._tokenizer is None:
            return [f"⟨{token}⟩" for token in token_ids]
        ids, texts = [*before, *token_ids], []
        read = len(before) - unread
        for end in range(len(before) + 1, len(ids) + 1):
            first = max(read - _CONTEXT, 0)
            known, whole = self._decode(ids[first:read]), self._decode(ids[first:end])
            if whole.endswith("\ufffd") and end - read < _CONTEXT:
                texts.append("")
            else:
                texts.append(whole[len(known) :])
                read = end
        return texts

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _unread(texts: list[str]) -> int:
    """How many texts at the end are empty: perhaps the beginning of a character."""
    count = 0
    while count < min(len(texts), _CONTEXT - 1) and not texts[-1 - count]:
        count += 1
    return count
