"""/health, /metrics and /version: what programs that watch a server ask."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from medusa_apar import __version__

from .metrics import Metrics
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["status"])

    @routes.get("/health", responses={503: {"description": "New requests are not answered now."}})
    @routes.head("/health", include_in_schema=False)
    async def health() -> JSONResponse:
        """200 where new requests are answered, else 503; the word is "loading", "ready", "draining" or "broken"."""
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(service.metrics.page(), headers={"Content-Type": Metrics.content_type})

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "engine": service.backend.name}

    return routes
