"""Chat corpora as examples: one answer each, what came before it, and the answer's paragraph tree.

Read are chat JSONL (`{"messages": [{"role", "content"}...]}`), ShareGPT's own JSON (`{"conversations": [{"from",
"value"}...]}`), both plain or gzipped, as lines or as one array, and names of Hugging Face data sets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_apar.job import on_a_terminal, replacing
from medusa_apar.json_files import is_text, numbered_lines, numbered_records, parse

from .rules import KINDS, MAX_DEPTH, Thread, is_narrative, paragraph_tree, splice

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
LOOPING = 0.5  # share of an answer's 4-grams of words that came before in it

Message = dict[str, str]


class BadCorpus(ValueError):
    """A corpus that is not what it should be, with file and line."""


@dataclass(slots=True)
class Example:
    """One conversation up to an answer, and the paragraph tree of that answer."""

    id: str
    messages: list[Message]  # all but the answer
    tree: Thread
    kind: str  # one of rules.KINDS: the rule that forked the answer
    reason: str = ""  # why a plain one stays whole
    loops: bool = False  # it says the same again and again: an example of what not to write
    place: str = field(default="", compare=False)  # file and line that it was read from

    def as_row(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "reason": self.reason,
            "messages": self.messages,
            "tree": _as_lists(self.tree),
        } | ({"loops": True} if self.loops else {})

    @classmethod
    def from_row(cls, row: Any, place: str = "") -> Example:
        """ValueError where it is no row that `as_row` could have made."""
        try:
            id, kind, reason, messages = row["id"], row["kind"], row.get("reason", ""), row["messages"]
            loops = row.get("loops", False)
            tree = _as_thread(row["tree"])
            texts = [id, reason, *(message[key] for message in messages for key in ("role", "content"))]
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else "its fields have other types"
            raise ValueError(f"no example of `medusa-apar data`, {why}") from error
        if not messages or kind not in KINDS or not all(isinstance(text, str) for text in texts) or loops not in (0, 1):
            raise ValueError("no example of `medusa-apar data`, its fields have other types")
        return cls(id, messages, tree, kind, reason, bool(loops), place)


@dataclass(slots=True)
class Drops:
    """What was left out and where: a count per reason, and the first places."""

    skip_bad: bool = False  # lines that cannot be used are left out too, instead of being an error
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    keep: int = 20  # places

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < self.keep:
            places.append(place)

    def bad(self, reason: str, place: str) -> None:
        """A line that cannot be used: counted under what `reason` says before its first comma, or BadCorpus."""
        if not self.skip_bad:
            raise BadCorpus(f"{place}: {reason}")
        self.add(reason.partition(",")[0], place)

    def as_report(self) -> dict[str, dict[str, Any]]:
        return {reason: {"count": n, "first": self.places[reason]} for reason, n in self.counts.most_common()}

    def __str__(self) -> str:
        return ", ".join(f"{n} {reason}, first {self.places[reason][0]}" for reason, n in self.counts.most_common())


def read_conversations(source: str | Path, bad: Callable[[str, str], None]) -> Iterator[tuple[str, str, list[Message]]]:
    """(place, id, messages) of every conversation in a file, or in the data set of that name.

    `bad(reason, place)` is told of each record that cannot be read, which is then skipped; it may raise.
    """
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{source or path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise OSError(f"{source} is no regular file: write what it gives into one first")
    if path.exists():
        records = file_records(path, bad)
    elif path.suffix in (".json", ".jsonl", ".gz") or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} does not exist")
    else:
        records = _dataset_records(str(source))
    for place, record in records:
        try:
            messages = as_messages(record)
        except ValueError as error:
            bad(str(error), place)
            continue
        name = str(record.get("id") or f"{path.name}/{place.rpartition(':')[2]}")
        if not all(map(is_text, [name, *(message["content"] for message in messages)])):
            bad("broken text, it holds what is no character in UTF-8", place)
            continue
        yield place, name, messages


def read_examples(
    sources: Iterable[str | Path],
    drops: Drops | None = None,
    *,
    all_turns: bool = False,
    max_depth: int = MAX_DEPTH,
    seen: set[int] | None = None,
    loops: bool = False,
) -> Iterator[Example]:
    """Examples of corpora, in order. Answers that are empty, repeated or loop are left out and counted in `drops`.

    drops: says, too, what is done about records that cannot be read; None raises BadCorpus with file and line.
    all_turns: every answer of a conversation is a target of its own; otherwise the last one.
    max_depth: of the trees.
    seen: hashes of the answers of earlier calls, whose repetitions are left out too; grows.
    loops: the answers that loop are wanted, and no others: what a model is to be trained against.
    """
    drops = drops if drops is not None else Drops()
    seen = seen if seen is not None else set()

    for source in sources:
        for place, name, messages in read_conversations(source, drops.bad):
            targets = list(_targets(messages, all_turns))
            if not targets:
                drops.add("no target", place)  # no answer that could be one follows a user's turn
            for number, (context, answer) in enumerate(targets):
                key = hash((context[-1]["content"], answer))
                if not answer.strip():
                    drops.add("empty answer", place)
                elif key in seen:
                    drops.add("duplicate", place)
                elif (repeated_share(answer.split()) > LOOPING) != loops:
                    drops.add("no loop" if loops else "looping answer", place)
                else:
                    tree, kind, reason = paragraph_tree(answer, is_narrative(context[-1]["content"]), max_depth)
                    assert splice(tree) == answer, place
                    id = f"{name}#{number}" if number else name
                    yield Example(id, context, tree, kind, reason, loops, place)
                seen.add(key)


def repeated_share(items: list[Any], n: int = 4) -> float:
    """Share of the n-grams of a sequence that came before in it; 0 for a short one."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """JSON lines that `load_examples` reads; the file appears when all is written."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example.as_row(), ensure_ascii=False) + "\n" for example in examples)


def load_examples(path: Path, drops: Drops | None = None) -> Iterator[Example]:
    """What `write_examples` wrote; `drops` as `read_examples` takes it."""
    drops = drops if drops is not None else Drops()
    for number, line in numbered_lines(path):
        place = f"{path}:{number}"
        try:
            example = Example.from_row(parse(line), place)
        except ValueError as error:
            drops.bad(str(error), place)
        else:
            yield example


def _targets(messages: list[Message], all_turns: bool) -> Iterator[tuple[list[Message], str]]:
    """The last answer, or the last and then the earlier ones; each with all that came before it."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    for index in reversed(turns if all_turns else turns[-1:]):
        if messages[index - 1]["role"] == "user":
            yield messages[:index], messages[index]["content"]


def as_messages(record: Any) -> list[Message]:
    """A record of any of the schemas as messages; ValueError with the reason where it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object, but {type(record).__name__}")
    if "messages" in record:
        turns, role_key, text_key = record["messages"], "role", "content"
    elif "conversations" in record:
        turns, role_key, text_key = record["conversations"], "from", "value"
    elif isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        if not isinstance(record.get("input"), str | None):
            raise ValueError(f"wrong schema, an input that is {type(record['input']).__name__}")
        question = "\n\n".join(filter(None, [record["instruction"], record.get("input")]))
        turns, role_key, text_key = (
            [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}],
            "role",
            "content",
        )
    else:
        raise ValueError(f"wrong schema, none of messages, conversations, instruction among {sorted(record)[:6]}")
    if not isinstance(turns, list) or not turns:
        raise ValueError("empty conversation")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise ValueError(f"wrong schema, a turn without the text {text_key!r}")
        role = ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise ValueError(f"unknown role, {repr(turn.get(role_key))[:40]} is none of {', '.join(ROLES)}")
        messages.append({"role": role, "content": turn[text_key]})
    while messages and messages[0]["role"] == "assistant":  # ShareGPT cuts conversations anywhere
        messages = messages[1:]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no answer, nothing in the conversation is by the assistant after a user's turn")
    return messages


def file_records(path: Path, bad: Callable[[str, str], None]) -> Iterator[tuple[str, Any]]:
    """(file:line, record) of JSON lines, or (file:number, record) of one JSON array."""
    for number, record in numbered_records(path):
        if isinstance(record, bytes):
            try:
                record = parse(record)
            except ValueError as error:
                bad(str(error), f"{path}:{number}")
                continue
        yield f"{path}:{number}", record


def _dataset_records(name: str) -> Iterator[tuple[str, Any]]:
    """Rows of a Hugging Face data set, `owner/name` or `owner/name:split` (split: train)."""
    try:
        import datasets
    except ImportError as error:
        raise BadCorpus(
            f"{name} is no file; as a data set's name it needs `pip install 'medusa-apar[train]'`"
        ) from error
    if not on_a_terminal():
        datasets.disable_progress_bars()
    name, _, split = name.partition(":")
    number = 0
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row
    except Exception as error:  # datasets raises a dozen kinds, its own and those of the Hub and of HTTP
        why = f"breaks off after row {number}" if number else "is neither a file nor a data set that can be had"
        raise BadCorpus(f"{name} {why} ({error})") from error


def _as_lists(thread: Thread) -> list:
    return [piece if isinstance(piece, str) else _as_lists(piece) for piece in thread.pieces]


def _as_thread(pieces: Any) -> Thread:
    if not isinstance(pieces, list):
        raise TypeError(f"the tree holds {type(pieces).__name__}")
    return Thread([piece if isinstance(piece, str) else _as_thread(piece) for piece in pieces])
