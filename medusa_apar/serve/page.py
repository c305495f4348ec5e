"""The page on which threads can be watched: files of our own, handed out as they are, nothing from anywhere else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Neither scripts nor styles within the HTML, no frame around it, and no request to anybody but this server: whatever an
# answer says, it stays text.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew each time, and answered 304 where nothing has changed
}

_API = b'<meta name="api" content="%s" />'  # where the page finds the API


class File(NamedTuple):
    """tag: of its content, as HTTP's ETag writes it."""

    content: bytes
    media_type: str
    tag: str


@cache
def page_files() -> dict[str, File]:
    """All that the page consists of, by name."""
    found = {}
    for entry in files(__package__).joinpath("page_files").iterdir():
        media_type = TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            found[entry.name] = _file(entry.read_bytes(), media_type)
    return found


def _file(content: bytes, media_type: str) -> File:
    return File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def router(prefix: str = "/v1") -> APIRouter:
    """`/` and `/page/NAME`. They need no key and tell nothing of the model: the page asks the API as clients do.

    prefix: of OpenAI's routes, which the page asks beside itself, wherever it is mounted.
    """
    routes, index = APIRouter(include_in_schema=False), page_files()["index.html"]
    whole = index.content.replace(_API % b"v1/", _API % f"{prefix}/".lstrip("/").encode())
    known = page_files() | {"index.html": _file(whole, index.media_type)}

    def answer(request: Request, file: File | None) -> Response:
        if file is None:
            return Response("The page has no such file.", 404, media_type="text/plain")
        headers = HEADERS | {"ETag": file.tag}
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def whole_page(request: Request) -> Response:
        return answer(request, known["index.html"])

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(request: Request, name: str) -> Response:
        return answer(request, known.get(name))

    return routes
