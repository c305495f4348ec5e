"""How answers become requests of vLLM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Args:
    max_requests: most answers that run at once; None for any number. Each has as many requests of vLLM as threads.
    max_waiting: most answers that wait; the next is refused with `QueueFull`. None for any number.
    data_parallel_size: of vLLM. All threads of an answer stay on one rank, since every rank has its own prefix cache.
    free_rows: how many rows a step of vLLM could have for what it costs without any (`lead.least_chance`). Ten is
        what two CPU cores gave; where steps wait for memory, as on a GPU, it is the rows up to which they do.
    speculates: whether vLLM drafts tokens, which it does for all requests or for none.
    """

    max_requests: int | None = 32
    max_waiting: int | None = 128
    data_parallel_size: int = 1
    free_rows: float = 10.0
    speculates: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_requests", 1), ("max_waiting", 0), ("data_parallel_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more.")
        if not self.free_rows > 0:
            raise ValueError(f"free_rows is {self.free_rows}, must be above 0.")
