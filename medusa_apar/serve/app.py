"""Routes and guards as one application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.middleware.cors import CORSMiddleware

from medusa_apar import __version__

from . import openai_routes, page, status_routes
from .errors import ApiError
from .guards import REQUEST_ID, BodyGuard, Exchanges, Gate, KeyGuard, LengthGuard, PageGuard, too_long
from .service import Service


def create_app(service: Service, more: Sequence[APIRouter] = (), prefix: str = "/v1") -> FastAPI:
    """The application of a service, which is started with it and closed with it, unless it is mounted in another:
    nobody tells it when that begins and ends.

    more: routes beside the server's own. prefix: where OpenAI's routes lie.
    """
    options = service.options
    guards = [
        Middleware(Exchanges),
        Middleware(KeyGuard, keys=options.api_keys),
        Middleware(PageGuard, options=options),
        Middleware(Gate, service=service, prefix=prefix),
        Middleware(BodyGuard),
        Middleware(LengthGuard, most=options.max_body_bytes),
    ]
    if options.cors_origins:  # outermost: a page may read refusals too, and a preflight has no key
        shown = [REQUEST_ID, "Retry-After"]
        allowed: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": shown}
        guards.insert(0, Middleware(CORSMiddleware, allow_origins=options.cors_origins, **allowed))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        start = asyncio.create_task(service.start())
        yield
        start.cancel()
        await asyncio.wait([start])
        if not start.cancelled():
            start.exception()  # looked at, as asyncio wants it: `service.failure` has it
        await service.close()

    app = FastAPI(
        title="medusa-apar",
        version=__version__,
        middleware=guards,
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            ApiError: _own_error,
            RequestValidationError: _invalid,
            HTTPException: _http_error,
        },
    )
    for router in (status_routes.router(service), openai_routes.router(service, prefix), page.router(prefix), *more):
        app.include_router(router)
    return app


async def _own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """400 with the field that is at fault, as OpenAI has it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = None if first["type"] == "json_invalid" else ".".join(place) or None
    said = f"{param}: {first['msg']}" if param else f"the body is not what this route takes: {first['msg']}"
    return ApiError(400, said, param=param).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What Starlette and FastAPI refuse: unknown paths, methods, bodies that are too large or no JSON."""
    assert isinstance(error, HTTPException)
    said = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
        413: too_long(request.scope.get(MAX_BODY_SIZE_SCOPE_KEY, 0)).message,
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, said, headers=error.headers).response()
