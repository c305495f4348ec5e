"""`medusa-apar chat`: a conversation whose answers are watched as they grow. One engine writes them all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from medusa_apar.display.answer_picture import facts
from medusa_apar.display.terminal import Lanes, answer_text
from medusa_apar.engine.engine import Engine
from medusa_apar.events import Consumer
from medusa_apar.generate import MedusaApar
from medusa_apar.models.chat import Message, encode_messages
from medusa_apar.requests import Sampling
from medusa_apar.threads.fork_policy import FORKS
from medusa_apar.threads.request import Request

COMMANDS = f"""/fork {"|".join(FORKS)}   where answers split
/reset                 forget the conversation
/help                  say this
/quit                  end, as Ctrl-D does

Ctrl-C stops an answer; what can be read of it is part of the conversation."""


class Chat:
    """On a terminal answers grow in lanes, a thread each, and then become a text. Elsewhere they are printed as they
    can be read, and standard output has nothing but them.

    Attributes: messages: the conversation so far. fork: where the next answers split.
    """

    def __init__(
        self, apar: MedusaApar, engine: Engine, console: Console, sampling: Sampling, fork: str, max_new_tokens: int
    ) -> None:
        self.messages: list[Message] = []
        self.fork = fork
        self._apar, self._engine, self._console = apar, engine, console
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._notes = console if console.is_terminal else Console(stderr=True)
        self._turns = 0

    def run(self, lines: Iterable[str]) -> None:
        """Answers line after line, until they end or one says so."""
        for line in lines:
            said = line.strip()
            if said in ("/quit", "/exit"):
                return
            if said.startswith("/"):
                self._command(*said.split())
            elif said:
                self._turn(said)

    def _command(self, name: str, *words: str) -> None:
        if name == "/fork" and len(words) < 2:
            self._set_fork(*words)
        elif name == "/reset" and not words:
            self.messages.clear()
            self._note("The conversation begins anew.")
        elif name == "/help":
            self._note(COMMANDS)
        else:
            self._note(f"There is no {' '.join((name, *words))}. /help says what there is.")

    def _set_fork(self, mode: str = "") -> None:
        if mode and mode not in FORKS:
            self._note(f"/fork takes one of {', '.join(FORKS)}, not {mode}.")
            return
        self.fork = mode or self.fork
        self._note(f"Answers fork: {self.fork}.")

    def _turn(self, question: str) -> None:
        """What is refused is said, and the conversation stays as it was."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        try:
            answer = self._lanes(asked) if self._console.is_terminal else self._plain(asked)
        except (ValueError, NotImplementedError) as error:
            self._note(f"{error}\n/reset begins anew.")
        else:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _lanes(self, asked: list[Message]) -> str:
        with Lanes(self._console, self._apar.tokenizer, transient=True) as lanes:
            answer = self._answer(asked, events=lanes)
        self._console.print(answer_text(self._apar.tokenizer, lanes.recording), highlight=False)
        self._note(f"{facts(lanes.recording, 0)}\n")
        return answer

    def _plain(self, asked: list[Message]) -> str:
        streamer = TextStreamer(self._apar.tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
        answer = self._answer(asked, streamer=streamer)
        streamer.end()
        return answer

    def _answer(self, asked: list[Message], events: Consumer | None = None, streamer: Any = None) -> str:
        """The text of the answer, as much of it as there is where Ctrl-C stops it."""
        self._turns += 1
        ids = encode_messages(self._apar.tokenizer, asked)["input_ids"][0].tolist()
        options: dict[str, Any] = {"sampling": self._sampling, "fork": self.fork, "events": events or False}
        request = self._apar.request(str(self._turns), ids, max_new_tokens=self._max_new_tokens, **options)
        with interrupts() as pressed:  # from the first moment at which the engine has it
            self._engine.add(request)
            while self._engine.unfinished:
                self._step(request, streamer)
                if pressed.is_set():
                    self._engine.abort(request.id)
        if request.error is not None:
            raise request.error
        tokenizer: Any = self._apar.tokenizer
        text: str = tokenizer.decode(request.text_ids, skip_special_tokens=True)
        return text

    def _step(self, request: Request, streamer: Any) -> None:
        for output in self._engine.step():
            if streamer is not None and output.token_ids:
                streamer.put(torch.tensor(output.token_ids, dtype=torch.long, device="cpu"))

    def _note(self, text: str) -> None:
        self._notes.print(text, style="dim", highlight=False, markup=False)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event and cuts through nothing: a step that does not come to its end breaks its engine."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def typed(console: Console) -> Iterator[str]:
    """Lines as they are typed at a prompt, with the editing keys and the history that readline has."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield console.input("[bold]> [/]")
        except EOFError:
            console.print()
            return
