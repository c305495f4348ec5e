"""This server within vLLM's own, at /v1/apar:  VLLM_PLUGINS=medusa_apar vllm serve MODEL

vLLM finds it by the entry point `vllm.endpoint_plugins` (setup.py) and loads it only where it is named. Its routes, its
engine and the engine's end stay vLLM's.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from medusa_apar.engine.vllm import compat
from medusa_apar.facts import ModelFacts
from medusa_apar.loading import control_tokens
from medusa_apar.models.sources import locate

from .app import create_app
from .options import ServeOptions
from .service import Service
from .vllm_backend import engine_over, facts_of

PATH = "/v1/apar"

logger = logging.getLogger("medusa_apar.serve")


class GivenClient:
    """A backend over a client that vLLM's server has made, and will shut down."""

    name = "vllm"
    pool_slots: int | None = None

    def __init__(self, client: Any, options: ServeOptions) -> None:
        self._client, self.engine = client, engine_over(client, options, owned=False)

    async def start(self) -> ModelFacts:
        config, tokenizer = self._client.model_config, self._client.renderer.get_tokenizer()
        source = locate(config.model, config.revision)
        return facts_of(self._client, tokenizer, control_tokens("auto", source, tokenizer, config.model))


class Plugin:
    """A plugin as vLLM's `EndpointPlugin` has it: first the routes, then what they answer with."""

    name = "medusa_apar"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: ASGIApp | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.mount(PATH, self)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Raises where the model cannot be answered with; vLLM's server does not start then."""
        compat.check_version()
        config = engine_client.vllm_config
        if config.scheduler_config.policy != "priority":
            logger.warning("without --scheduling-policy priority threads are not written in the order they are read")
        if not config.cache_config.enable_prefix_caching:
            logger.warning("without --enable-prefix-caching every fork has its whole path computed anew")
        keys = tuple(args.api_key or filter(None, [os.environ.get("VLLM_API_KEY")]))
        origins = tuple(args.allowed_origins or ())
        options = ServeOptions(host=args.host or "0.0.0.0", api_keys=keys, cors_origins=origins)
        service = Service(GivenClient(engine_client, options), (args.served_model_name or [args.model])[0], options)
        self._app = create_app(service, prefix="")
        await service.start()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._app is not None, "vLLM calls init_state before it answers"
        await self._app(scope, receive, send)
