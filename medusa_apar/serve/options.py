"""How a server serves, whatever its requests ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from medusa_apar.engine.options import EngineOptions

_KEY = re.compile(r"[\x21-\x7e]+")  # what an Authorization header can carry


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Args:
    host, port: where it listens; port 0 takes a free one.
    api_keys: each of them opens the routes; without any they are open.
    max_requests: most requests that run at once; None: as many as the pool has room for.
    max_queue: most requests that wait; one more is answered with 429. None: any number.
    pool_slots, max_prefill_rows: as of `EngineOptions`.
    prefix_cache: whether prompts and answers are kept for requests that begin alike.
    cors_origins: origins whose pages may ask; "*" is any.
    max_body_bytes: of a request's body; a longer one is answered with 413 before it is read.
    shutdown_timeout: seconds that running answers have to come to their end after the first signal.
    access_log: whether each request leaves a line of JSON on standard error.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_requests: int | None = 32
    max_queue: int | None = 128
    pool_slots: int | None = None
    max_prefill_rows: int | None = None
    prefix_cache: bool = True
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    shutdown_timeout: float = 30.0
    access_log: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}, must be from 0 to 65535.")
        for key in self.api_keys:
            if not _KEY.fullmatch(key):
                raise ValueError("an API key is empty, or holds spaces or letters beyond ASCII.")
        for name, least in (("max_body_bytes", 1), ("shutdown_timeout", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be {least} or more.")
        EngineOptions(**self.engine_changes())  # says itself what cannot be

    def engine_changes(self) -> dict[str, Any]:
        """For `MedusaApar.engine`."""
        return {
            "max_requests": self.max_requests,
            "max_waiting": self.max_queue,
            "pool_slots": self.pool_slots,
            "max_prefill_rows": self.max_prefill_rows,
            "prefix_cache": self.prefix_cache,
        }
