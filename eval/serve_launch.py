"""What is settled before a server of the load benchmark starts: what all have in common, and the command of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
MODEL_NAME = "model"  # as the peers are told to call theirs
QUEUE = 1_000_000  # places of our servers: one that refuses questions looks quicker than one that answers them


@dataclass(frozen=True, slots=True)
class Serving:
    """How every server is started. threads: of the CPU. context: tokens that a prompt and its answer have at most."""

    model: str = "smollm2-135m"
    heads: str = "auto"
    quantize: str | None = None
    dtype: str | None = None
    threads: int = 1
    clients: int = 1  # at once, at most
    context: int = 2048
    prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server comes to be there.

    command: with `{port}` for its port; empty for one that runs already, at `url`. body: what its requests have beside
    what everybody's have. pooled: whether `--pool-slots` caps it. cached: whether its prefix cache is on, whatever the
    others' are.
    """

    name: str
    about: str
    weights: str
    log: Path
    command: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    software: str = ""
    pooled: bool = False
    cached: bool = False
    url: str = ""
    model: str | None = None

    def capped(self, slots: int | None) -> Launch:
        """With so many KV slots at most."""
        return self if slots is None else replace(self, command=(*self.command, "--pool-slots", str(slots)))
