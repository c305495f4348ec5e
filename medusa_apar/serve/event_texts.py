"""Events as a stream carries them: dictionaries for JSON, with every token's text, since a browser has no tokenizer.

Each is the event's own fields and `event`, its name; where it has `token_ids` it has `texts` too, one for each token.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from medusa_apar.display.pieces import Pieces
from medusa_apar.events import Drafted, Event, TokensAccepted, TokensInserted, TokensRejected
from medusa_apar.events.recording import Recording

_ANCHOR = "a"  # a token by itself may lose its leading space


class GuessTexts:
    """Texts of single tokens, each decoded once. A guess may be half of a character, which nobody waits for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, str]()
        self._anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
        self._alone = self._decode(self._anchor)

    def of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode([*self._anchor, token]).removeprefix(self._alone)
        return self._texts[token]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class EventTexts:
    """Writes one request's events, which come in their order.

    guesses: shared by all requests of a server.
    """

    def __init__(self, tokenizer: Any, guesses: GuessTexts) -> None:
        self._recording, self._pieces, self._guesses = Recording(), Pieces(tokenizer), guesses

    def __call__(self, event: Event) -> dict[str, Any]:
        self._recording(event)
        written = {"event": type(event).__name__, **_plain(event, self._guessed)}
        if isinstance(event, (TokensAccepted, TokensInserted)):
            thread = self._recording.tree_of(event).threads[event.thread]
            written["texts"] = self._pieces.of(thread)[-len(event.token_ids) :] if event.token_ids else []
        return written

    def _guessed(self, part: Any) -> dict[str, Any]:
        guessed = isinstance(part, (Drafted, TokensRejected))
        return {"texts": [self._guesses.of(token) for token in part.token_ids]} if guessed else {}


def _plain(value: Any, more: Any) -> Any:
    """What JSON knows; `more` are further entries for a dataclass."""
    if is_dataclass(value):
        its = {field.name: _plain(getattr(value, field.name), more) for field in fields(value)}
        return its | more(value)
    if isinstance(value, frozenset):
        return sorted(value)
    return list(map(partial(_plain, more=more), value)) if isinstance(value, tuple) else value
