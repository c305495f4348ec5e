"""What answers behind a service: our own engine, or another that takes the same requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Protocol

from medusa_apar.engine.stats import Stats
from medusa_apar.facts import ModelFacts

from .options import ServeOptions

if TYPE_CHECKING:
    from medusa_apar.engine.async_engine import AsyncEngine
    from medusa_apar.engine.engine import Engine
    from medusa_apar.engine.outputs import RequestOutput
    from medusa_apar.generate import MedusaApar
    from medusa_apar.threads.request import Request


class Backend(Protocol):
    """name: as /version tells it. pool_slots: most KV slots that prompt and answer can have, where that bounds what may
    be asked for."""

    name: str
    pool_slots: int | None

    @property
    def engine(self) -> AsyncEngine:
        """The same from beginning to end, or one that answers nothing yet, until `start` has returned."""

    async def start(self) -> ModelFacts:
        """Loads the model, and returns once the engine takes requests. Raises what went wrong."""


class NoEngine:
    """Stands where an engine is still being made."""

    healthy = False

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        raise RuntimeError("the engine takes no requests: it is not started.")
        yield

    def abort(self, request: Request) -> None:
        pass

    async def drain(self, timeout: float | None = None) -> bool:
        return True

    async def close(self) -> None:
        pass

    def stats(self) -> Stats:
        return Stats()


class NativeBackend:
    """Our own engine.

    Args:
        load: returns the model; called once, in the engine's thread.

    Attributes: `apar` is the model, once it is loaded.
    """

    name = "native"

    def __init__(self, load: Callable[[], MedusaApar], options: ServeOptions) -> None:
        from medusa_apar.engine.async_engine import ThreadedEngine

        self._load, self._options, self.pool_slots = load, options, options.pool_slots
        self.apar: MedusaApar | None = None
        self._threaded = ThreadedEngine(self.make)

    @property
    def engine(self) -> AsyncEngine:
        return self._threaded

    async def start(self) -> ModelFacts:
        await self._threaded.start()
        assert self.apar is not None
        return self.apar.facts

    def make(self) -> Engine:
        """Called in the engine's thread."""
        self.apar = self._load()
        return self.apar.engine(**self._options.engine_changes())
