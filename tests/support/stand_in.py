"""A server that stands in for one with a model: streams as many tokens as it is asked for, two to a chunk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse

from medusa_apar.eval.serve_bench import Asking

ASKING = Asking(
    *("digest", 64, True, 0.0, 1.0, False, "m", "auto", "int8", None, "a cpu", "weights", "software", 8, None),
    *(4, 16, 60.0, 0),
)

METRICS = """# HELP medusa_apar:kv_slots KV slots by what they hold.
# TYPE medusa_apar:kv_slots gauge
medusa_apar:kv_slots{state="live"} 30.0
medusa_apar:kv_slots{state="free"} 70.0
medusa_apar:kv_slots_peak 55.0
medusa_apar:kv_slots_unfreed 40.0
medusa_apar:threads_running 3.0
medusa_apar:steps_total 20.0
medusa_apar:generation_tokens_total 50.0
medusa_apar:request_generation_tokens_sum 40.0
medusa_apar:written_tokens_total 70.0
medusa_apar:unread_tokens 6.0
"""


class StandIn:
    """What it was asked (`bodies`), and how many questions it was answering at once at most (`peak`).

    refuses: a status that every question is answered with. breaks: streams end in the middle.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.peak = 0
        self.refuses: int | None = None
        self.breaks = False
        self._lock = threading.Lock()
        self.app = FastAPI()
        self.app.get("/health")(lambda: {})
        self.app.get("/metrics")(lambda: Response(METRICS, media_type="text/plain"))
        self.app.get("/v1/models")(lambda: {"data": [{"id": "stand-in"}]})
        self.app.post("/v1/chat/completions")(self.answer)

    def answer(self, body: dict[str, Any]) -> Response:
        self.bodies.append(body)
        if self.refuses is not None:
            return JSONResponse({"error": {"message": "not today", "type": "x"}}, self.refuses)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        with self._lock:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
        try:
            left = body["max_tokens"] if body.get("ignore_eos") else 3
            finish = "length" if body.get("ignore_eos") else "stop"
            usage = {"prompt_tokens": 5, "completion_tokens": left, "prompt_tokens_details": {"cached_tokens": 1}}
            yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            while left > 0 and not self.breaks:
                text = " a" * min(left, 2)
                left -= 2
                time.sleep(0.002)
                yield event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])
            if not self.breaks:
                yield event(choices=[{"index": 0, "delta": {}, "finish_reason": finish}])
                yield event(choices=[], usage=usage)
                yield "data: [DONE]\n\n"
        finally:
            with self._lock:
                self.in_flight -= 1


def event(**chunk: Any) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', **chunk})}\n\n"


class Served:
    """The stand-in behind a port of this process, while the block runs."""

    def __init__(self, stand_in: StandIn) -> None:
        self._server = uvicorn.Server(uvicorn.Config(stand_in.app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
