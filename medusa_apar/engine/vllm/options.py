"""How answers become requests of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

# Rows that a step could have for what it costs without any. A prototype on two CPU cores had 45, 77 and 108 ms for 1, 4
# and 16 rows of a model of 135 million parameters. A GPU's step waits for memory up to its peak arithmetic over its
# bandwidth, some 295 rows on an H100 in bfloat16: computed, not measured.
CPU_FREE_ROWS, GPU_FREE_ROWS = 10.0, 256.0


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Args:
    max_requests: most answers that run at once; None for any number. Each has as many requests of vLLM as threads.
    max_waiting: most answers that wait; the next is refused with `QueueFull`. None for any number.
    data_parallel_size: of vLLM. All threads of an answer stay on one rank, since every rank has its own prefix cache.
    free_rows: how many rows a step of vLLM could have for what it costs without any (`lead.least_chance`).
    speculates: whether vLLM drafts tokens, which it does for all requests or for none.
    """

    max_requests: int | None = 32
    max_waiting: int | None = 128
    data_parallel_size: int = 1
    free_rows: float = CPU_FREE_ROWS
    speculates: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_requests", 1), ("max_waiting", 0), ("data_parallel_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more.")
        if not self.free_rows > 0:
            raise ValueError(f"free_rows is {self.free_rows}, must be above 0.")
