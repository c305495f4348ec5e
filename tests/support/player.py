"""A judge that tests play: an HTTP server of this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Player:
    """A judge on a local port: `play` sees the messages and gives its answer, or an HTTP status with headers, or what
    is to be done with the handler."""

    def __init__(self):
        self.play = lambda messages: "[[5]]"
        self.models = ["judge-1"]
        self.requests = []  # (path, headers, body)
        player = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                player.requests.append((self.path, dict(self.headers), None))
                if isinstance(player.models, int):
                    return self.reply(player.models, {})
                self.reply(200, {"data": [{"id": name} for name in player.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                player.requests.append((self.path, dict(self.headers), body))
                answer = player.play(body["messages"])
                if callable(answer):
                    return answer(self)
                if isinstance(answer, tuple):
                    return self.reply(*answer)
                self.reply(200, {"choices": [{"message": {"role": "assistant", "content": answer}}]})

            def reply(self, status, content, headers=()):
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # a client that has waited long enough hangs up
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def asked(self):
        return [body["messages"][-1]["content"] for _, _, body in self.requests if body]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
