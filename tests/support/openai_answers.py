"""A server of the bytes writer, asked over HTTP, and what it streams put together again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from tests.support.bytes_writer import bytes_writer
from tests.support.serving import Running, running

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
QUESTION = [{"role": "user", "content": "aé?"}]


@contextmanager
def byte_server(seed: int = 0, engine: str = "native", **options: Any) -> Iterator[Server]:
    json_type = {"Content-Type": "application/json"}  # of bodies that a test writes itself
    with running(lambda: bytes_writer(seed), engine=engine, **options) as its, its.client(headers=json_type) as client:
        yield Server(its, client)


class Server:
    def __init__(self, its: Running, client: Any) -> None:
        self.its, self.client, self.apar = its, client, cast(Any, its.service.backend).apar
        self.tokenizer: Any = self.apar.tokenizer

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer in one piece."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """What the server says of a body, which may be bytes."""
        how = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = self.client.post(path, **how)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    def chunks(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """A stream's, which has to end as it should."""
        return chunks_of(self.lines(path, **body))

    def lines(self, path: str, **body: Any) -> str:
        response = self.client.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return response.content.decode()  # strict: a character that is cut fails here

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chunks_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith("data: [DONE]\n\n")
    events = text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def put_together(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """One choice of a stream as an answer in one piece has it; asserts the order in which its chunks come."""
    text, ids, reason, told = "", [], None, []
    role = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert reason is None, "a chunk behind the last"
            if "delta" in choice:
                role = choice["delta"].get("role", role)
                assert role == "assistant"
                text += choice["delta"].get("content", "")
                told += (choice["logprobs"] or {}).get("content", [])
            else:
                text += choice["text"]
                told += list(_tokens(choice["logprobs"]))
            ids += choice.get("token_ids", [])
            reason = choice["finish_reason"]
    return {"text": text, "ids": ids, "reason": reason, "told": told}


def whole(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The same of an answer in one piece."""
    choice = answer["choices"][index]
    assert choice["index"] == index
    if "message" in choice:
        text, told = choice["message"]["content"], (choice["logprobs"] or {}).get("content", [])
    else:
        text, told = choice["text"], list(_tokens(choice["logprobs"]))
    return {"text": text, "ids": choice.get("token_ids", []), "reason": choice["finish_reason"], "told": told}


def _tokens(logprobs: dict[str, Any] | None) -> Iterator[tuple]:
    """The older form, token by token."""
    if logprobs is not None:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        yield from zip(*(logprobs[name] for name in names), strict=True)
