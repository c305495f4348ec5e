"""A FastAPI application of your own with a route that streams answers, many at once, from one engine.

    python -m uvicorn --app-dir examples --port 8080 stream_route:app

Then `curl -N 'http://127.0.0.1:8080/answer?question=How+do+I+sleep+better'`, or an `EventSource` in a browser. Each
event is a piece of text as JSON; the last is called "end". A client that goes away ends its answer.
"""

import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import medusa_apar
from medusa_apar.engine.async_engine import ThreadedEngine
from medusa_apar.events.texts import TextStream, TokenTexts

apar = medusa_apar.load(os.environ.get("MODEL", "smollm2-135m"))
engine = ThreadedEngine(lambda: apar.engine(max_requests=8, prefix_cache=True))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await engine.start()
    yield
    await engine.close()


app = FastAPI(lifespan=lifespan)


@app.get("/answer")
async def answer(question: str) -> StreamingResponse:
    chat = [{"role": "user", "content": question}]
    inputs = apar.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    request = apar.request(uuid.uuid4().hex, inputs["input_ids"], max_new_tokens=512)
    return StreamingResponse(events(request), media_type="text/event-stream")


async def events(request) -> AsyncIterator[str]:
    text = TextStream(TokenTexts.of(apar.tokenizer))  # cuts no character in two
    async with aclosing(engine.generate(request)) as outputs:  # closed early, it aborts the request
        async for output in outputs:
            piece = "".join(map(text.push, output.token_ids))
            if output.finish_reason is not None:
                piece += text.end()
            if piece:
                yield f"data: {json.dumps(piece)}\n\n"
    yield f"event: end\ndata: {json.dumps(output.finish_reason)}\n\n"
