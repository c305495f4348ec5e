"""Files that others wrote: whatever is wrong with one becomes a sentence that names it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .json_files import json_object

T = TypeVar("T")

MAX_REASON = 400  # characters
# Beyond any that were trained: a key of a head file alone must not decide how much is allocated.
MAX_HEADS, MAX_LAYERS = 32, 8
_OUT_OF_MEMORY = re.compile("can(?:'|no)t allocate memory|out of memory")


@contextmanager
def reading(source: str | os.PathLike[str], verdict: str = "cannot be read") -> Iterator[None]:
    """Whatever a library raises while it reads `source` becomes a ValueError, or an OSError, of one line.

    Each library has kinds of its own for a damaged file: SafetensorError, KeyError, struct.error, plain Exception. Too
    little memory is no fault of the file's and stays what it is.
    """
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if error.filename is not None:  # the system's own, which names the file
            raise
        raise OSError(f"{source} {verdict} ({_reason(error)})") from error
    except NotImplementedError as error:
        raise NotImplementedError(f"{source} {verdict} ({_reason(error)})") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        if "`trust_remote_code=True` to" in str(error):
            words = "brings code of its own, which runs only where it is trusted"
            raise ValueError(f"{source} {words} (trust_remote_code=True, or --trust-remote-code)") from error
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            # Without the cause: torch's message tells people to load the file in a way that runs its code.
            words = "is no plain file of tensors: it is damaged, or a pickle of something else, which is not read"
            raise ValueError(f"{source} {words}") from None
        raise ValueError(f"{source} {verdict} ({_reason(error)})") from error


def out_of_memory(error: BaseException) -> bool:
    """Python's own error, or torch's on a CPU or on CUDA."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it ends early"
    words = " ".join(str(error).split())
    words = words if len(words) <= MAX_REASON else f"{words[:MAX_REASON]} ..."
    return words if words and not isinstance(error, KeyError) else f"{type(error).__name__} {words}".strip()


def expanded(path: str | os.PathLike[str]) -> Path:
    """With the home directory for `~`; where there is none, the path as it is, which then does not exist."""
    return Path(os.path.expanduser(path))


def field(config: Mapping[str, Any], name: str, kind: type[T], path: Path) -> T | None:
    """`config[name]`, None where it is absent or null; ValueError where it is of another kind than the file needs."""
    value = config.get(name)
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    words = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}
    raise ValueError(f"{name} is {value!r} in {path}, must be {words[kind]}")


def shards(index: Path) -> dict[str, Path]:
    """Weight name -> file, as a `*.index.json` says; ValueError where one lies outside of its folder."""
    named = field(json_object(index), "weight_map", dict, index) or {}
    for key, name in named.items():
        # By name alone: the Hub's cache links every file of a folder to a blob elsewhere.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index} says that {key} lies in {name!r}, which is no file of its folder")
    return {key: index.parent / name for key, name in named.items()}
