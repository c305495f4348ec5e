"""Where an answer forks: where the model emits `[Fork]`, or at the list items a model without control tokens writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .list_items import ListItem, begins_item, forking_item, indentation
from .paragraph_tree import Fork, ParagraphTree, Thread

FORKS = ("auto", "off", "lists")


@dataclass(frozen=True, slots=True)
class ForkPoint:
    """A place where a thread is about to fork, as a `fork_if` sees it: nothing but the thread's path, so that its
    answer cannot depend on when, beside what or with which drafts the thread runs.

    path_ids: prompt, ancestors and thread, up to where the child would hang (a `[Fork]` not included).
    token_ids: the last of these, the thread's own. depth: the thread's, 0 for the trunk. forks: its children so far.
    """

    path_ids: list[int]
    token_ids: list[int]
    depth: int
    forks: int


ForkIf = Callable[[ForkPoint], bool]


class Turn(Enum):
    """What a child's last token says."""

    RETURN = "it has ended, and its parent goes on; the token is not part of the text"
    CONTINUE_PARENT = "it writes the rest of its parent's text: what the parent and its later children wrote is dropped"


class NoForks:
    """One thread an answer; what the other policies answer differently."""

    def fork(self, tree: ParagraphTree, thread: Thread) -> Fork | None:
        """Asked behind every token a thread has chosen."""
        return None

    def turn(self, tree: ParagraphTree, thread: Thread) -> Turn | None:
        """Asked before `fork`, of every child that has not taken over."""
        return None

    def ends_line(self, thread: Thread) -> bool:
        """Whether an ended child's text ends with a line break."""
        return False

    def max_invisible_tokens(self, max_new_tokens: int, max_depth: int) -> int:
        """Most tokens of a path that are no part of a text of `max_new_tokens`."""
        return 0


class ControlTokenForks(NoForks):
    """Forks at every `[Fork]`. Where it may be chosen at all is the verifier's to say."""

    def fork(self, tree: ParagraphTree, thread: Thread) -> Fork | None:
        if thread.tokens[-1] != tree.fork_id:
            return None
        assert tree.child_id is not None
        return Fork((tree.child_id,))

    def max_invisible_tokens(self, max_new_tokens: int, max_depth: int) -> int:
        return max_new_tokens + 2 * max_depth  # text and [Fork] may alternate, with a [Child] per level


@dataclass(slots=True)
class ListForks(NoForks):
    """Forks the trunk at list items by rule, without control tokens or training.

    Where the trunk has finished the title of an item, from the second of its list on, a child writes the item, and the
    trunk is made to write the line break and the next item's marker. The child's path is the text up to the end of the
    list's first item, then its own item's marker and title: behind titles without details, models write titles without
    details.

    A child whose next line begins the next item ends there. A child that writes anything else there, or ends its
    answer, says that the list is over: it takes over, and what the trunk has listed beyond it is dropped. Where the
    trunk repeats a title it has run dry, and that item's child takes over at once.

    All of it is read off a thread's own text, at token boundaries: a token that holds a title's end and a line break is
    still the title's end. A thread's chosen tokens are what the model writes behind its path, inserted ones included.

    fork_if: asked at every such title; where it says no, the trunk writes on as it would have.
    """

    tokenizer: Any
    fork_if: ForkIf | None = None
    _texts: dict[int, str] = field(default_factory=dict)

    def fork(self, tree: ParagraphTree, thread: Thread) -> Fork | None:
        if thread.parent is not None or not self._text(thread.tokens[-1]).rstrip().endswith((":", "*", "-", "–", "—")):
            return None
        found = forking_item(self._joined(thread.token_ids))
        if found is None:
            return None
        second, own = (self._token_at(thread, place) for place in (found.second, found.begin))
        if second is None or own is None or (self.fork_if is not None and not self.fork_if(fork_point(thread))):
            return None
        child = tuple(thread.tokens[own:])
        if found.repeated:
            return Fork(child, second, continues_parent=True)
        breaks = "\n" * found.line_breaks
        line_break = self._encode(breaks, "")
        parent = (*line_break, *self._encode(found.item.next_marker, breaks))
        return Fork(child, second, parent, len(line_break))

    def turn(self, tree: ParagraphTree, thread: Thread) -> Turn | None:
        if thread.tokens[-1] in tree.eos_ids:
            return Turn.CONTINUE_PARENT
        begun = self._text(thread.tokens[-1]).lstrip()
        if not begun:
            return None
        space, index = self._space_before_last(thread)
        if "\n" not in space:
            return None
        item = ListItem.of(self._joined(thread.tokens[: thread.num_forced]))
        assert item is not None
        if indentation(space.rsplit("\n", 1)[1]) > item.indent or item.holds(begun):
            return None
        if index < thread.num_forced and not begins_item(begun):
            return None  # a paragraph below an item that is nothing but a title
        return Turn.RETURN if item.is_followed_by(begun) else Turn.CONTINUE_PARENT

    def ends_line(self, thread: Thread) -> bool:
        shown = thread.tokens[: len(thread.tokens) - (thread.finish_reason == "stop")]
        for token in reversed(shown[thread.num_forced - 1 :]):
            if text := self._text(token).rstrip(" \t"):
                return text.endswith("\n")
        return False

    def max_invisible_tokens(self, max_new_tokens: int, max_depth: int) -> int:
        return max_new_tokens + 16  # two line breaks an item, whose marker and title are longer; the last insertion

    def _space_before_last(self, thread: Thread) -> tuple[str, int]:
        """White space before the text of a child's last token, and the index of the last token with text before it."""
        text = self._text(thread.tokens[-1])
        space = text[: len(text) - len(text.lstrip())]
        for index in range(len(thread.tokens) - 2, thread.num_forced - 2, -1):
            text = self._text(thread.tokens[index])
            space = text[len(text.rstrip()) :] + space
            if text.strip():
                break
        return space, index

    def _token_at(self, thread: Thread, place: int) -> int | None:
        """The token that begins at a place in a thread's own text; None if the place lies within one."""
        for index in range(thread.num_forced, len(thread.tokens)):
            if place <= 0:
                break
            place -= len(self._text(thread.tokens[index]))
        return index if place == 0 else None

    def _joined(self, token_ids: list[int]) -> str:
        return "".join(map(self._text, token_ids))

    def _text(self, token: int) -> str:
        """What a token adds to a text; by itself some tokenizers would strip its leading space."""
        if token not in self._texts:
            anchor = self.tokenizer.encode("a", add_special_tokens=False)
            whole, before = (
                self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([*anchor, token], anchor)
            )
            self._texts[token] = whole[len(before) :]
        return self._texts[token]

    def _encode(self, text: str, before: str) -> list[int]:
        """A text's tokens behind another, a word in front of both; by itself some tokenizers would add a space."""
        lead, whole = (self.tokenizer.encode("a" + part, add_special_tokens=False) for part in (before, before + text))
        if whole[: len(lead)] == lead:
            ids: list[int] = whole[len(lead) :]
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def fork_point(thread: Thread, ahead: Sequence[int] = (), forks_ahead: int = 0) -> ForkPoint:
    """Where a thread stands once it has also chosen the tokens `ahead`, so many of which fork."""
    path = [*thread.ancestor_ids(), *thread.tokens, *ahead]
    return ForkPoint(path, [*thread.token_ids, *ahead], thread.depth, len(thread.children) + forks_ahead)


def fork_mode(fork: bool | str) -> str:
    """One of FORKS; True and False are "auto" and "off"."""
    mode = ("auto" if fork else "off") if isinstance(fork, bool) else fork
    if mode not in FORKS:
        raise ValueError(f"fork is {fork!r}, must be {', '.join(map(repr, FORKS))}, True or False.")
    return mode


def fork_policy(mode: str, fork_if: ForkIf | None, max_depth: int, tokenizer: Any) -> NoForks:
    """The fork manager's part of a mode."""
    if mode == "auto":
        return ControlTokenForks()
    if mode == "off" or max_depth == 0:
        return NoForks()
    if tokenizer is None:
        raise ValueError("fork='lists' needs the tokenizer: pass tokenizer=... to generate or attach.")
    return ListForks(tokenizer, fork_if)
