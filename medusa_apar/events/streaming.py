"""The batch's reading order as columns: one token per row, as transformers streams and returns them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request


class EndedOnce:
    """A streamer whose reader is told of the end once: a second one would end the next call's text."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._ended = streamer, False

    def put(self, token_ids: torch.Tensor) -> None:
        self._streamer.put(token_ids)

    def end(self) -> None:
        if not self._ended:
            self._streamer.end()
            self._ended = True


@contextmanager
def ended_on_error(streamer: EndedOnce | None) -> Iterator[None]:
    """Ends a streamer, if there is one, where the block fails: whoever reads it would wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            with suppress(Exception):  # the first error is the one to tell
                streamer.end()
        raise


class TextColumns:
    def __init__(self, requests: list[Request], pad_id: int):
        self._requests, self._pad_id = requests, pad_id
        self._sent = 0

    def new(self) -> Iterator[torch.Tensor]:
        """int64 [rows] for each column that has become final in every row; rows already done are padded."""
        ready = min((len(request.text) for request in self._requests if not request.done), default=self._width)
        for column in range(self._sent, ready):
            column_ids = [self._token(request, column) for request in self._requests]
            yield torch.tensor(column_ids, dtype=torch.long, device="cpu")
        self._sent = max(self._sent, ready)

    def text(self) -> torch.Tensor:
        """All columns, int64 [rows, longest]."""
        rows = [[self._token(request, column) for column in range(self._width)] for request in self._requests]
        return torch.tensor(rows, dtype=torch.long, device="cpu").reshape(len(rows), self._width)

    def gather(self, kept: Sequence[dict[Thread, list[torch.Tensor]]]) -> tuple[torch.Tensor, ...]:
        """Per column [rows, vocab] of what each row has kept for its tokens; zeros where a row had ended."""
        blank = torch.zeros_like(next(iter(kept[0].values()))[0])
        return tuple(
            torch.stack([self._kept(*pair, column, blank) for pair in zip(kept, self._requests, strict=True)])
            for column in range(self._width)
        )

    @property
    def _width(self) -> int:
        return max(len(request.text) for request in self._requests)

    def _token(self, request: Request, column: int) -> int:
        return request.text_ids[column] if column < len(request.text) else self._pad_id

    def _kept(
        self, kept: dict[Thread, list[torch.Tensor]], request: Request, column: int, blank: torch.Tensor
    ) -> torch.Tensor:
        if column >= len(request.text):
            return blank
        thread, index = request.text[column]
        return kept[thread][index - thread.num_forced]
