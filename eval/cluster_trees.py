"""Recorded paragraph trees without their words: how long threads get and where they fork.

A file of them is JSON: `about` says how they were recorded, `answers` has for each question the tokens of its prompt
and the threads of its answer with forks and without. A thread is [parent, place, length, ended]: its parent's number
and the parent's own token that is its `[Fork]`, -1 for the trunk; how many tokens it wrote, control and end tokens
included; and whether it came to its end. One that did not was cut by the recording's limit, or was cancelled since
nothing that it wrote could be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medusa_apar.json_files import json_object
from medusa_apar.threads.paragraph_tree import ParagraphTree

TEXT, FORK, CHILD, EOS = range(4)  # all that a simulation knows of a token
MODES = {"forked": "auto", "plain": "off"}


class RecordedThread(NamedTuple):
    parent: int
    place: int
    length: int
    ended: bool


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """prompt: its tokens. forked, plain: threads, parents first."""

    id: str
    prompt: int
    forked: tuple[RecordedThread, ...]
    plain: tuple[RecordedThread, ...]


class Script:
    """What the threads of one recorded answer write.

    Attributes:
        tokens: of each thread, one of TEXT, FORK and EOS a token.
        children: by thread and the place of its `[Fork]`, which thread that forks.
    """

    def __init__(self, threads: Sequence[RecordedThread]) -> None:
        self.children = {(its.parent, its.place): number for number, its in enumerate(threads) if its.parent >= 0}
        written = [bytearray(its.length) for its in threads]
        for parent, place in self.children:
            written[parent][place] = FORK
        for own, its in zip(written, threads, strict=True):
            if its.ended:
                own[-1] = EOS
        self.tokens = [bytes(own) for own in written]


def threads_of(tree: ParagraphTree) -> tuple[RecordedThread, ...]:
    """ValueError where a rule forked: what that inserts and skips is not recorded."""
    found = []
    for thread in tree.threads:
        parent, place = -1, -1
        if thread.parent is not None:
            if thread.parent.tokens[thread.fork_index] != tree.fork_id:
                raise ValueError("a thread was forked by rule: only answers that fork at `[Fork]` can be recorded.")
            parent, place = thread.parent.index, thread.fork_index - thread.parent.num_forced
        found.append(RecordedThread(parent, place, len(thread.token_ids), thread.finish_reason == "stop"))
    return tuple(found)


def record(apar: Any, questions: Sequence[tuple[str, list[int]]], limit: int) -> list[RecordedAnswer]:
    """Has the native engine answer them all, with forks and without.

    Args:
        apar: MedusaApar.
        questions: id and prompt of each.
        limit: tokens of an answer, several times what will be simulated: a thread is cancelled as soon as it stands
            beyond this limit, and what it would have written then is not known.
    """
    from medusa_apar.events.recording import Recording

    found = {}
    for mode, fork in MODES.items():
        recordings = {id: Recording() for id, _ in questions}
        with apar.engine(max_requests=len(questions)) as engine:
            for id, prompt in questions:
                engine.add(apar.request(id, prompt, max_new_tokens=limit, fork=fork, events=recordings[id]))
            while engine.unfinished:
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
        found[mode] = {id: threads_of(its.trees[0]) for id, its in recordings.items()}
    return [RecordedAnswer(id, len(prompt), found["forked"][id], found["plain"][id]) for id, prompt in questions]


def text_of(answers: Sequence[RecordedAnswer], about: dict[str, Any]) -> str:
    """A file of them, a line an answer."""
    lines = [
        json.dumps({"id": its.id, "prompt": its.prompt, "forked": its.forked, "plain": its.plain}) for its in answers
    ]
    return f'{{"about": {json.dumps(about)},\n"answers": [\n' + ",\n".join(lines) + "\n]}\n"


def read(path: Path) -> list[RecordedAnswer]:
    """ValueError, in one sentence, for a file that holds no such trees; OSError for one that cannot be read."""
    entries = json_object(path).get("answers")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no recorded answers")
    answers = []
    for number, entry in enumerate(entries, 1):
        try:
            answer = RecordedAnswer(
                str(entry["id"]), entry["prompt"], *(_threads(entry[mode]) for mode in ("forked", "plain"))
            )
            _check(answer)
        except (KeyError, TypeError, ValueError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: answer {number} is no recorded one ({why})") from error
        answers.append(answer)
    return answers


def _threads(rows: Any) -> tuple[RecordedThread, ...]:
    return tuple(RecordedThread(*row) for row in rows)


def _check(answer: RecordedAnswer) -> None:
    if type(answer.prompt) is not int or answer.prompt < 1:
        raise ValueError("its prompt is no number of tokens")
    for threads in (answer.forked, answer.plain):
        forks = [(its.parent, its.place) for its in threads[1:]]
        if not threads or threads[0][:2] != (-1, -1) or len(set(forks)) < len(forks):
            raise ValueError("it has no trunk, or two children at one place")
        for number, its in enumerate(threads):
            if [type(value) for value in its] != [int, int, int, bool] or its.length < its.ended:
                raise ValueError(f"thread {number} is not [parent, place, length, ended]")
            if number and not (0 <= its.parent < number and 0 <= its.place < _forkable(threads[its.parent])):
                raise ValueError(f"thread {number} forks where its parent wrote nothing")


def _forkable(thread: RecordedThread) -> int:
    """How many of its tokens may be a `[Fork]`: all but the one that ends it."""
    return thread.length - thread.ended
