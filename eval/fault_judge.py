"""Whether what came of a request in the fault campaign is right."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .fault_cases import Case
from .fault_host import Wrong

CLEAR = (429, 503)  # refusals of what would be answered at another time


class Gone(Exception):
    """The server takes no connection any more, as it may not at its end: nothing of the event has reached it."""


@dataclass(frozen=True, slots=True)
class When:
    """What may come of a request. "" is while all is well, "kill" or "drain" from when the server is brought to its
    end.

    sent: as it was before the request was sent: what was sent in time is still owed its answer by a drain. now: as it
    is when the answer has come. alone: nobody else asks, so that there is no reason to refuse.
    """

    sent: str = ""
    now: str = ""
    alone: bool = False

    def may_refuse(self, status: int) -> bool:
        if status == 503:
            return bool(self.sent) or self.now == "kill"
        return status == 429 and not self.alone


def judge(case: Case, status: int, headers: Any, content: bytes, stream: bool, when: When) -> str:
    """What the answer counts as. Wrong unless it is the right one, or a clear refusal where there may be one."""
    if status != 200:
        said = refusal(status, headers, content)
        if not when.may_refuse(status):
            raise Wrong(f"HTTP {status} ({said}) for {case.body}")
        return f"HTTP {status}"
    found = read_stream(content) if stream else read_whole(content)
    if found.error:
        if when.now != "kill":
            raise Wrong(f"the stream ended with {found.error!r} for {case.body}")
        return "error in the stream"
    compare(case, found)
    return "right"


def refusal(status: int, headers: Any, content: bytes) -> str:
    """What an error says. Wrong where it is not in OpenAI's form, or says to come again and not when."""
    try:
        error = json.loads(content)["error"]
        said: str = error["message"]
        kind: str = error["type"]
    except (ValueError, KeyError, TypeError):
        raise Wrong(f"HTTP {status} with {content[:200]!r}") from None
    later = status in CLEAR and "has died" not in said  # a dead engine is mended by nobody's waiting
    if not said or not kind or (later and not str(headers.get("retry-after", "")).isdecimal()):
        raise Wrong(f"HTTP {status} with {error}, Retry-After {headers.get('retry-after')}")
    return said


@dataclass
class Found:
    """An answer as it was read; lists have an entry for each choice."""

    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    tokens: int | None = None
    error: str = ""


def compare(case: Case, found: Found) -> None:
    """Against what an engine alone has answered."""
    if found.tokens != sum(map(len, found.ids)):
        raise Wrong(f"usage has {found.tokens} tokens, and {found.ids} came for {case.body}")
    if found.ids != case.ids:
        raise Wrong(f"the answer has tokens {found.ids}, and the engine alone gives {case.ids} for {case.body}")
    if (found.texts, found.reasons) != (case.texts, case.reasons):
        raise Wrong(f"{found.texts} ({found.reasons}) is not {case.texts} ({case.reasons}) for {case.body}")


def read_whole(content: bytes) -> Found:
    try:
        answer = json.loads(content)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
        ids, reasons = ([choice[name] for choice in choices] for name in ("token_ids", "finish_reason"))
        return Found(texts, ids, reasons, answer["usage"]["completion_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"an answer that is none ({error!r}): {content[:200]!r}") from error


def read_stream(content: bytes) -> Found:
    events = [event[6:] for event in content.decode("utf-8").split("\n\n") if event.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise Wrong(f"a stream without its end: {content[-200:]!r}")
    found = Found()
    try:
        for event in map(json.loads, events[:-1]):
            _add(found, event)
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"a stream that is none ({error!r}): {content[-200:]!r}") from error
    return found


def _add(found: Found, event: dict[str, Any]) -> None:
    if "error" in event:
        found.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        while len(found.texts) <= choice["index"]:
            found.texts.append("")
            found.ids.append([])
            found.reasons.append(None)
        place = choice["index"]
        found.texts[place] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        found.ids[place] += choice.get("token_ids") or []
        found.reasons[place] = choice["finish_reason"] or found.reasons[place]
    if event.get("usage"):
        found.tokens = event["usage"]["completion_tokens"]


def parse(content: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer after which the connection was closed. Wrong for what is none."""
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    try:
        if headers.get("transfer-encoding") == "chunked":
            body = _unchunked(body)
        return int(first.split()[1]), headers, body
    except (IndexError, ValueError):
        raise Wrong(f"an answer that begins with {first[:100]!r} and ends with {content[-100:]!r}") from None


def _unchunked(body: bytes) -> bytes:
    """ValueError where the last chunk, which is empty, has not come."""
    whole, length = b"", -1
    while length:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + body[:length], body[length + 2 :]
    return whole
