"""JSON as others wrote it: lines, arrays and objects, none of which can fill the memory. Whatever is wrong is said in a
sentence of a ValueError."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_RECORD = 1 << 26  # bytes of a line, of an array's record and of an object: a book has one to five million
CHUNK = 1 << 20
LIMIT = f"{MAX_RECORD >> 20} MiB"
UNREADABLE = (EOFError, zlib.error, gzip.BadGzipFile)
_SPACE = re.compile(r"[ \t\r\n]*")


def parse(text: str | bytes) -> Any:
    """ValueError with the reason where it is no JSON."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"broken text, {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON, {error}") from error
    except ValueError as error:  # Python's own limit
        raise ValueError("broken JSON, a number has thousands of digits") from error
    except RecursionError as error:
        raise ValueError("broken JSON, it nests too deeply") from error


def is_text(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_object(path: Path) -> dict[str, Any]:
    """The one object that a file holds."""
    with path.open("rb") as file:
        text = file.read(MAX_RECORD + 1)
    if len(text) > MAX_RECORD:
        raise ValueError(f"{path} is longer than {LIMIT}, which is no file of this kind")
    try:
        found = parse(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {type(found).__name__}")
    return found


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 1, of a file that may be gzipped and may begin with a byte order mark."""
    with _opened(path) as file:
        yield from _lines(file, path)


def parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The same, parsed; ValueError with file and line for the first that is no JSON."""
    for number, line in numbered_lines(path):
        try:
            yield number, parse(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def numbered_records(path: Path) -> Iterator[tuple[int, bytes | Any]]:
    """What `numbered_lines` gives, or the parsed records of a file that is one JSON array."""
    with _opened(path) as file:
        yield from (_array if _is_array(file) else _lines)(file, path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield file
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read to its end: {error}") from error


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := _line(file, path, number):
        number += 1
        if len(line) > MAX_RECORD:
            raise ValueError(f"{path}:{number} is longer than {LIMIT}: write one record a line")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _line(file: BinaryIO, path: Path, number: int) -> bytes:
    try:
        return file.readline(MAX_RECORD + 1)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read after line {number}: {error}") from error


def _is_array(file: BinaryIO) -> bool:
    """Whether the first character that is no space is a bracket; leaves the file at its begin."""
    start = b""
    while block := file.read(1 << 12):
        start = (start + block).removeprefix(codecs.BOM_UTF8).lstrip()
        if start:
            break
    file.seek(0)
    return start.startswith(b"[")


def _array(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Records one by one, without the whole text in memory."""
    # A broken byte must cost its record only: it becomes half a surrogate pair, which is found later.
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    scan = json.JSONDecoder().raw_decode
    text, number, expected, ended = "", 0, "[", False
    while not ended:
        block = file.read(max(CHUNK, len(text)))  # twice as much each time that a record is not whole yet
        ended = not block
        text += decoder.decode(block, ended)
        at, problem = 0, "it ends within its array"
        while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
            if expected == "" or (expected == "," and text[at] not in ",]") or (expected == "[" and text[at] != "["):
                raise ValueError(f"{path} cannot be read: {text[at : at + 20]!r} behind record {number} of its array")
            if text[at] == "]" and (expected == "," or number == 0):
                at, expected = at + 1, ""
            elif expected != "value":
                at, expected = at + 1, "value"
            else:
                try:
                    record, end = scan(text, at)
                except ValueError as error:
                    problem = f"record {number + 1} is broken JSON ({error.args[0].partition(':')[0]})"
                    break
                except RecursionError as error:
                    raise ValueError(f"{path} cannot be read: record {number + 1} nests too deeply") from error
                if end == len(text) and not ended:  # a number may go on
                    break
                at, expected, number = end, ",", number + 1
                yield number, record
        text = text[at:]
        if ended and expected:
            raise ValueError(f"{path} cannot be read: {problem}")
        if len(text) > MAX_RECORD:
            raise ValueError(f"{path} cannot be read: {problem}, or it is longer than {LIMIT}")
