"""A model behind an OpenAI-compatible HTTP endpoint, asked with nothing but the standard library."""

from __future__ import annotations

import io
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from time import monotonic, sleep
from typing import Any

TIMEOUT = 300.0  # seconds of one answer, from the question to its last byte; a judge on a CPU is slow
MAX_BYTES = 1 << 22  # of an answer: `max_tokens` below make some ten thousand
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
MAX_WAIT = 120.0  # of a Retry-After that is obeyed


class ChatEndpoint:
    """`url` is the base, as in http://localhost:8000/v1; `$OPENAI_API_KEY` is sent where it is set."""

    def __init__(self, url: str, model: str | None = None) -> None:
        """Without `model`, the only one that the endpoint lists.

        ConnectionError where nobody answers, PermissionError where the key is refused, ValueError where it must be
        said which model.
        """
        if not _is_address(url):
            raise ValueError(f"{url} is no address of a judge: one looks like http://localhost:8000/v1")
        self._headers = {"Content-Type": "application/json"}
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds what no key has: a line break, or a letter beyond ASCII")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": 2048}
        listed = self._listed()
        if model is None and len(listed) != 1:
            names = f"lists {', '.join(listed[:5])}" if listed else "lists no models"
            raise ValueError(f"{self.url} {names}: say with --judge-model which one is to judge")
        self.model = model or listed[0]

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The model's answer; a busy or failing endpoint is tried again, a little later each time."""
        reason = ""
        waits = list(WAITS)
        while True:
            try:
                body = {"model": self.model, "messages": messages, **self.options}
                return _content(self._call("/chat/completions", body, TIMEOUT), self.url)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    self._drop_option(error)
                    continue
                reason, asked = f"HTTP {error.code}", _retry_after(error)
            except (OSError, HTTPException) as error:  # no answer in time, or a connection that broke
                reason, asked = str(getattr(error, "reason", error) or type(error).__name__), 0.0
            if not waits:
                raise ConnectionError(
                    f"{self.url} failed {len(WAITS) + 1} times, at last with {reason}; what it has judged is kept: "
                    "the same command goes on from there"
                )
            sleep(max(waits.pop(0), asked))

    def _listed(self) -> list[str]:
        """Names of the endpoint's models; none where it has no such list."""
        try:
            found = self._call("/models", None, 15.0)
            return [str(entry["id"]) for entry in found["data"]]
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise PermissionError(
                    f"{self.url} refuses the key (HTTP {error.code}): set OPENAI_API_KEY to one that it takes"
                ) from error
            return []
        except (KeyError, TypeError, ValueError):
            return []
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ConnectionError(f"nobody answers at {self.url} ({reason}): is the judge running there?") from error

    def _call(self, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, self._headers)
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")  # the key is for this host alone
        content = _fetch(request, timeout)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{self.url} answers with over {MAX_BYTES >> 20} MiB, which no judge has to say")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.url} answers with something that is not JSON: {content[:100]!r}") from error

    def _drop_option(self, error: urllib.error.HTTPError) -> None:
        """Newer models refuse `max_tokens` or a temperature, and name it; anything else is the end."""
        text = error.read(MAX_BYTES).decode("utf-8", "replace")
        try:
            problem = json.loads(text)["error"]
            named, said = str(problem.get("param")), str(problem.get("message", text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            named, said = "", text
        if named not in self.options:
            raise ValueError(f"{self.url} refuses the question (HTTP {error.code}): {said[:300]}") from error
        del self.options[named]


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isascii()
    except ValueError:  # a port that is no number
        return False


def _fetch(request: urllib.request.Request, timeout: float) -> bytes:
    """The answer's body, at most a byte beyond MAX_BYTES. TimeoutError where it has not ended in time.

    In a thread of its own: a socket's own timeout begins anew with every byte, that of an answer's headers too.
    """
    ended = threading.Event()
    got: list[bytes] = []
    failed: list[Exception] = []
    until = monotonic() + timeout

    def read(answer: Any) -> bytes:
        parts, size = [], 0
        while size <= MAX_BYTES and monotonic() < until and (part := answer.read1(1 << 16)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)[: MAX_BYTES + 1]

    def fetch() -> None:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                got.append(read(answer))
        except urllib.error.HTTPError as error:
            body = io.BytesIO(read(error))  # read in here, as it may have no end either
            failed.append(urllib.error.HTTPError(error.url, error.code, error.msg, error.headers, body))
        except Exception as error:
            failed.append(error)
        finally:
            ended.set()

    threading.Thread(target=fetch, name="judge's answer", daemon=True).start()
    if not ended.wait(timeout) or monotonic() >= until:
        raise TimeoutError(f"timed out after {timeout:g} seconds")
    if failed:
        raise failed[0]
    return got[0]


def _content(answer: Any, url: str) -> str:
    try:
        content = answer["choices"][0]["message"]["content"] or ""
        if isinstance(content, str):
            return content.encode("utf-8", "replace").decode()  # half a surrogate pair fits in no file
    except (KeyError, IndexError, TypeError):
        pass
    raise ValueError(f"{url} answers otherwise than OpenAI's chat completions do: {str(answer)[:200]}")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds; 0 without one, and for the form that is a date."""
    asked = error.headers.get("Retry-After") or ""
    return min(float(asked), MAX_WAIT) if asked.isascii() and asked.isdigit() else 0.0
