"""An OpenAI-compatible server over one engine: FastAPI and uvicorn carry it, `AsyncEngine` does the work.

options.py        `ServeOptions`: how a server serves
errors.py         `ApiError`: what a client is told, in OpenAI's words
exchange.py       what is known of one HTTP request while it is answered
service.py        `Service`: the model behind the routes, from loading to draining
metrics.py        what Prometheus reads
guards.py         what every request passes first: its id and log line, the key, whether the server can answer now
status_routes.py  /health, /metrics and /version
app.py            `create_app`: routes and guards as one application
server.py         `serve`: the socket, the signals, the start-up lines
"""
