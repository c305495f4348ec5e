"""What every request passes before its route: its id and log line, the API key, whose page it is,
whether the server can answer now, and its body's type, time and length.

ASGI middlewares, outermost first. They touch headers, bodies and the first message of an answer alone, so that
streams flow through them as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
import uuid
from datetime import UTC, datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .exchange import begin, exchange_of_scope
from .options import ServeOptions
from .service import Service

REQUEST_ID = "X-Request-Id"
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_LONGEST_PATH = 200  # characters of it that are logged
_BODY_SECONDS = 60.0  # in which a body has to be there
_PORTS = {"http": 80, "https": 443}

access_log = logging.getLogger("medusa_apar.access")
logger = logging.getLogger("medusa_apar.serve")


def path_of(scope: Scope) -> str:
    """The path within the application, which may be mounted in another."""
    path, root = scope["path"], scope.get("root_path", "")
    inside = path.removeprefix(root)
    return (inside or "/") if inside[:1] in ("", "/") else path


def needs_key(path: str) -> bool:
    """All do but /health and the page's own files."""
    return path not in ("/", "/health") and not path.startswith("/page/")


def answers_always(path: str) -> bool:
    """Whether a path is answered while the model is loaded, while the server drains, and where the engine has died."""
    return not needs_key(path) or path in ("/metrics", "/version")


class Exchanges:
    """Gives each request its `Exchange`, echoes its id, and logs it when it has ended: one line of JSON, without what
    was asked or answered, keys, or a query. Whatever a route fails by becomes a 500 with a word.

    499 is the status of what its client did not wait for, however it had begun."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(REQUEST_ID, "")
        exchange = begin(scope, asked if _ID.fullmatch(asked) else uuid.uuid4().hex)
        status, whole, left = 499, False, False

        async def noting(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = exchange.id
            else:
                whole = not message.get("more_body", False)
            await send(message)

        async def listening() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not whole)
            return message

        try:
            await self.app(scope, listening, noting)
        except ClientDisconnect:  # in the middle of its body: nobody is left to be told
            pass
        except Exception:
            started = status != 499
            status = 500
            if started:
                raise
            logger.exception("request %s failed", exchange.id)
            error = ApiError(500, "the server failed to answer this request")
            await error.response()(scope, listening, noting)
        finally:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": exchange.id,
                "method": scope["method"],
                "path": scope["path"][:_LONGEST_PATH],
                "status": 499 if left else status,
                "ms": round(1000 * (time.perf_counter() - exchange.began), 1),
                "prompt_tokens": exchange.prompt_tokens,
                "answer_tokens": exchange.answer_tokens,
            }
            access_log.info("%s", json.dumps(line))


class KeyGuard:
    """401 without one of the keys, which come as `Authorization: Bearer KEY`.

    Every key is compared in full, by digests of equal length: the time says nothing of how much was right.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self._secret = app, secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = self._digest(key.strip().encode("latin-1"))
            known = sum(hmac.compare_digest(digest, its) for its in self._digests) > 0
            if known and scheme.lower() == "bearer":
                exchange_of_scope(scope).tenant = digest.hex()
            elif needs_key(path_of(scope)):
                said = "this server asks for an API key: send it as 'Authorization: Bearer KEY'"
                error = ApiError(401, said, headers={"WWW-Authenticate": "Bearer"}, code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, hashlib.sha256)


class PageGuard:
    """403 for web pages of other origins where no key is asked for: else any page could drive its reader's server.

    Browsers say with every POST of a page whose it is, and other clients do not: those are let through. A page whose
    own name leads to this address, as DNS rebinding has it, comes over plain HTTP by a name that we do not know. Over
    TLS there is a proxy, which knows whom it serves.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self.app, self._allowed, self._host = app, options.cors_origins, options.host.lower()
        self._open = not options.api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open and scope["type"] == "http" and needs_key(path_of(scope)):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and not self._may_ask(origin, headers):
                said = f"pages of {origin[:200]} may not ask this server: --cors-origin or --api-key would let them"
                await ApiError(403, said).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _may_ask(self, origin: str, headers: Headers) -> bool:
        if "*" in self._allowed or origin in self._allowed or headers.get("sec-fetch-site") == "same-origin":
            return True  # the last is said by browsers alone, to 127.0.0.1 and over TLS, whatever a proxy does to Host
        try:
            page, server = urlsplit(origin), urlsplit(f"//{headers.get('host', '')}")
            ports = (page.port or _PORTS.get(page.scheme), server.port)
        except ValueError:
            return False
        if page.hostname is None or page.hostname != server.hostname or ports[1] not in (None, ports[0]):
            return False
        return page.scheme == "https" or self._knows(page.hostname)

    def _knows(self, name: str) -> bool:
        """Whether nobody else's DNS can lead a name here."""
        try:
            ip_address(name)
        except ValueError:
            return name == self._host or "." not in name or name.endswith(".localhost")
        return True


class Gate:
    """503 while the server does not answer new requests, 429 where its queue is full; counts those that it answers, so
    that a drain can wait.

    prefix: of the routes that need a place in the queue."""

    def __init__(self, app: ASGIApp, service: Service, prefix: str) -> None:
        self.app, self._service, self._prefix = app, service, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or answers_always(path_of(scope)):
            await self.app(scope, receive, send)
            return
        try:
            self._service.check_answers()
            if scope["method"] == "POST" and self._queues(path_of(scope)):
                self._service.check_queue()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        with self._service.in_flight():
            await self.app(scope, receive, send)

    def _queues(self, path: str) -> bool:
        return path.startswith(f"{self._prefix}/") and path not in ("/tokenize", "/detokenize")


class BodyGuard:
    """415 for a body that does not say that it is JSON, which any page of any origin could send; 408 for one that is
    not there in time."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if has_body and kind != "application/json":
            said = f"the body says that it is {kind[:100] or 'nothing'}: send 'Content-Type: application/json' with it"
            await ApiError(415, said).response()(scope, receive, send)
            return
        deadline, reading = asyncio.get_running_loop().time() + _BODY_SECONDS, has_body

        async def timely() -> Message:
            nonlocal reading
            if not reading:  # then it waits for the client to go
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                said = f"the body was not there within {_BODY_SECONDS:g} seconds"
                raise ApiError(408, said, headers={"Connection": "close"}) from None
            reading = message.get("more_body", False)
            return message

        await self.app(scope, timely, send)


class LengthGuard:
    """413 for a body that is longer than this server takes by its own word; Starlette counts those that say nothing.

    The rest of such a body is thrown away as it comes, since most clients read no answer before they have sent it.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self._counting, self._most = app, RequestBodyLimitMiddleware(app, most), most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if length.isdecimal() and int(length) > self._most:
            await too_long(self._most).response()(scope, receive, send)
        else:
            await self._counting(scope, receive, send)


def too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than the {most} bytes that this server takes")
