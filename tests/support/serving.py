"""A server of its own for a test: a tiny model behind uvicorn, with one route that needs no tokens' texts.

Run as a module it is a process to send signals to: it loads once a line has come in on standard input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import medusa_apar
from medusa_apar import MedusaApar
from medusa_apar.new_request import engine_request
from medusa_apar.requests import CallOptions, Sampling
from medusa_apar.serve.app import create_app
from medusa_apar.serve.backends import NativeBackend
from medusa_apar.serve.options import ServeOptions
from medusa_apar.serve.server import Server, listen, serve
from medusa_apar.serve.service import Service
from medusa_apar.threads.request import Request
from tests.support.models import CONTROL, forking_model
from tests.support.stand_in_vllm import StandInBackend
from tests.support.tokenizers import tiny_tokenizer

PLAIN: Any = {"trust_env": False, "verify": False}  # reading certificates is what takes a client its time
SECONDS = 30  # longer than anything here takes: what hangs fails


def tiny_apar() -> MedusaApar:
    """Without guesses, so that a thread has one token a step."""
    model = forking_model(5, "wide_llama")
    return medusa_apar.attach(model, None, CONTROL, tokenizer=tiny_tokenizer(), speculation="off")


@dataclass
class Hold:
    """Stops no answer, but lets each of its tokens wait until it is allowed; the engine waits with it."""

    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: int = 0  # tokens

    def __call__(self, request: Request) -> bool:
        self.asked += 1
        assert self.allowed.acquire(timeout=SECONDS)
        return False


class Asked(BaseModel):
    prompt: list[int]
    max_tokens: int = 40
    stream: bool = False
    held: bool = False  # by the server's `Hold`
    pause: float = 0.0  # seconds before each token, at least
    padding: int = 0  # bytes behind each line of a stream


def tokens_router(service: Service, hold: Hold) -> APIRouter:
    """`/v1/tokens`: ids in, ids out; a stream has a line of JSON for each output with tokens."""
    routes = APIRouter()

    @routes.post("/v1/tokens")
    async def tokens(body: Asked, http: HttpRequest) -> Any:
        slow = body.held or body.pause
        asked = CallOptions(fork="off" if slow else "auto")
        request = engine_request(
            service.facts, service.new_id(), body.prompt, Sampling(), asked, max_new_tokens=body.max_tokens
        )
        if slow:
            stop = hold if body.held else _pausing(body.pause)
            request = Request(request.id, body.prompt, replace(request.options, stop=stop, eos_ids=frozenset()))
        outputs = service.run(request, http)
        if not body.stream:
            ids = [token async for output in outputs for token in output.token_ids]
            return {"id": request.id, "token_ids": ids}
        first = await anext(outputs)  # what is refused is refused before the stream begins

        async def lines() -> AsyncIterator[str]:
            yield json.dumps(first.token_ids) + "\n"
            async for output in outputs:
                if output.token_ids:
                    yield json.dumps(output.token_ids) + " " * body.padding + "\n"

        return StreamingResponse(lines())

    return routes


def _pausing(seconds: float) -> Callable[[Request], bool]:
    def stop(request: Request) -> bool:
        time.sleep(seconds)
        return False

    return stop


@dataclass
class Running:
    url: str
    port: int
    service: Service
    server: Server
    hold: Hold
    thread: threading.Thread

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, **PLAIN, **options)

    def ask(self, prompt: list[int], **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/tokens", json={"prompt": prompt, **fields})

    def idle(self) -> bool:
        """Whether nothing is answered, and no slot or place is held."""
        stats = self.service.engine.stats()
        held = stats.running + stats.waiting + stats.live_slots + self.service.num_in_flight
        return not held

    def wait_until_idle(self) -> None:
        wait_until(self.idle)


def sent(server: Running, prompt: list[int], headers: str = "", **fields: Any) -> socket.socket:
    """A socket on which a request was sent, and nothing read."""
    body = json.dumps({"prompt": prompt, **fields})
    client = socket.create_connection(("127.0.0.1", server.port), SECONDS)
    head = f"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def wait_until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.002)


@contextmanager
def running(load: Any, ready: bool = True, engine: str = "native", **options: Any) -> Iterator[Running]:
    """A server in a thread of this process, which no signal reaches: `server.handle_exit` stands for one.

    load: returns the model; or is the backend itself.
    """
    chosen = ServeOptions(port=0, access_log=False, **options)
    backend = {"native": NativeBackend, "vllm": StandInBackend}[engine](load, chosen) if callable(load) else load
    service = Service(backend, "tiny", chosen)
    hold, listener = Hold(), listen("127.0.0.1", 0)
    server = Server(service, create_app(service, [tokens_router(service, hold)]))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    its = Running(f"http://127.0.0.1:{port}", port, service, server, hold, thread)
    try:
        if ready:
            wait_until(lambda: service.state == "ready")
        yield its
    finally:
        hold.allowed.release(10_000)
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


if __name__ == "__main__":

    def load() -> MedusaApar:
        sys.stdin.readline()
        torch.set_num_threads(1)
        return tiny_apar()

    service = Service(load, "tiny", ServeOptions(port=0))
    sys.exit(serve(service, create_app(service, [tokens_router(service, Hold())])))
