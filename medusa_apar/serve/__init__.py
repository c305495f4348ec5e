"""An OpenAI-compatible server over one engine: FastAPI and uvicorn carry it, `AsyncEngine` does the work.

options.py        `ServeOptions`: how a server serves
errors.py         `ApiError`: what a client is told, in OpenAI's words
exchange.py       what is known of one HTTP request while it is answered
backends.py       `Backend`: what answers; our own engine
vllm_backend.py   vLLM in its place
vllm_plugin.py    the other way round: this server within vLLM's own
service.py        `Service`: the model behind the routes, from loading to draining
metrics.py        what Prometheus reads
guards.py         what every request passes first: its id and log line, the key, its page, whether the server can answer
status_routes.py  /health, /metrics and /version
aside.py          work that grows with a body, off the event loop
bodies.py         the JSON of a request's body, and one sentence for what is wrong with it
schemas.py        every field that a body can have
tool_schemas.py   what it says of tools
prompts.py        from texts, conversations and tools to token ids
translate.py      from a body to requests of the engine
tool_calls.py     what an answer calls of the tools, and how it is made to
answers.py        from the engine's outputs to what a client reads
forms.py          the two shapes that an answer has over the wire, whole and in chunks
streams.py        several answers at once, and server-sent events
openai_routes.py  /v1/chat/completions, /v1/completions, /v1/models, /tokenize and /detokenize
event_texts.py    events as a stream carries them, with every token's text
app.py            `create_app`: routes and guards as one application
page.py           the page on which threads can be watched: its files over HTTP
server.py         `serve`: the socket, the signals, the start-up lines
"""
