"""Instructions that a program can check: which there are, and whether an answer follows them.

A line of a prompt set may have `checks`, an object of names from the table below and what each is told, such as
`{"items": 4, "without": "the"}`. Words are compared as words, whatever their case; phrases as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from medusa_apar.json_files import parse

from .prompts import Prompt
from .quality_text import Item, lists_of

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_FENCED = re.compile(r"```(?:json)?\n(.*)\n```", re.DOTALL)
_TITLE_LINE = re.compile(r"#{1,6}[ \t]+\S.*|\*\*[^*\n]+\*\*")


def words_of(text: str) -> list[str]:
    """Its words in lower case, without marks of punctuation and of lists."""
    return [word.casefold() for word in _WORD.findall(re.sub(r"^[ \t]*\d{1,3}[.)][ \t]", "", text, flags=re.MULTILINE))]


def _items(text: str) -> list[Item]:
    return [item for its in lists_of(text) for item in its]


def _each_item(text: str, holds: Callable[[list[str]], bool]) -> bool:
    """Whether there are items, and the words of every one are so."""
    items = _items(text)
    return bool(items) and all(holds(words_of(text[item.begin : item.end])) for item in items)


def _blocks(text: str) -> list[str]:
    return [block for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def _is_json(text: str, keys: list[str]) -> bool:
    """Whether the whole text is a JSON object with these keys and no others, fenced as code or not."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        found = parse(fenced[1] if fenced else text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def _in_order(items: list[Item]) -> bool:
    heads = [item.head for item in items]
    return len(heads) > 1 and heads == sorted(heads)


def _all_of(told: str | list[str], holds: Callable[[str], bool]) -> bool:
    return all(map(holds, [told] if isinstance(told, str) else told))


# By name: whether a text that has words is so, and the kind of what the check is told.
CHECKS: dict[str, tuple[Callable[[str, Any], bool], type | tuple[type, ...]]] = {
    "items": (lambda text, count: len(_items(text)) == count, int),
    "numbered": (lambda text, count: sum(item.marker.number is not None for item in _items(text)) == count, int),
    "bullets": (lambda text, count: sum(item.marker.number is None for item in _items(text)) == count, int),
    "titled_items": (lambda text, count: sum(bool(item.marker.title) for item in _items(text)) == count, int),
    "item_max_words": (lambda text, most: _each_item(text, lambda words: len(words) <= most), int),
    "item_has": (lambda text, word: _each_item(text, lambda words: word.casefold() in words), str),
    "items_in_order": (lambda text, wanted: _in_order(_items(text)) == wanted, bool),
    "headings": (lambda text, count: len(re.findall(r"^#{1,6}[ \t]+\S", text, re.MULTILINE)) == count, int),
    "paragraphs": (lambda text, count: len(_blocks(text)) == count, int),
    "min_words": (lambda text, least: len(words_of(text)) >= least, int),
    "max_words": (lambda text, most: len(words_of(text)) <= most, int),
    "with": (lambda text, told: _all_of(told, lambda word: word.casefold() in words_of(text)), (str, list)),
    "without": (lambda text, told: _all_of(told, lambda word: word.casefold() not in words_of(text)), (str, list)),
    "without_characters": (lambda text, characters: not set(characters) & set(text), str),
    "starts_with": (lambda text, phrase: text.lstrip().startswith(phrase), str),
    "ends_with": (lambda text, phrase: text.rstrip().endswith(phrase), str),
    "lower_case": (lambda text, wanted: (text == text.lower()) == wanted, bool),
    "upper_case": (lambda text, wanted: (text == text.upper()) == wanted, bool),
    "json_keys": (_is_json, list),
    "title_line": (lambda text, wanted: bool(_TITLE_LINE.fullmatch(text.strip().split("\n")[0])) == wanted, bool),
    # A word and how often it stands there at least.
    "times": (lambda text, told: all(words_of(text).count(w.casefold()) >= n for w, n in told.items()), dict),
}


def followed(text: str, checks: dict[str, Any]) -> dict[str, bool]:
    """By the check's name, whether the answer follows it. One without a word follows none."""
    says_something = bool(words_of(text))
    return {name: says_something and CHECKS[name][0](text, told) for name, told in checks.items()}


def validate(prompts: Iterable[Prompt]) -> None:
    """ValueError for the first check that is none of ours, or is told what it cannot be."""
    for prompt in prompts:
        for name, told in prompt.checks.items():
            if name not in CHECKS:
                raise ValueError(f"prompt {prompt.id} has a check {name!r}, which is none of {', '.join(CHECKS)}")
            kinds = CHECKS[name][1]
            if not isinstance(told, kinds) or (isinstance(told, bool) and kinds is not bool) or not _is_plain(told):
                raise ValueError(f"prompt {prompt.id} tells its check {name!r} {told!r}, which it cannot be told")


def _is_plain(told: Any) -> bool:
    """Words in a list, numbers of words in an object."""
    if isinstance(told, list):
        return bool(told) and all(isinstance(word, str) for word in told)
    if isinstance(told, dict):
        return bool(told) and all(isinstance(number, int) for number in told.values())
    return True
