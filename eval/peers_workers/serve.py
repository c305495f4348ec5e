"""The protocol of every worker: JSON lines, one question in, one answer out.

A worker is a script that the peer's own Python runs as `SCRIPT SETTINGS`, SETTINGS being JSON. It writes
`{"ready": {...}}` once it can answer, then for each `{"ids": [...], "limit": n, "sampling": ...}` on standard input an
answer with `ids` (an end token included), `seconds` and `first_token_seconds`. `sampling` is null for greedy decoding,
else it has `temperature`, `top_p` and `seed`. It ends with its input. Nothing of medusa_apar is imported here: it is
not installed where this runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# OpenMP's and TBB's threads spin for a while after their last work (Intel's for 200 ms); the next system's time must
# not begin before they sleep.
SETTLE = 0.3  # seconds

# (ids, limit, sampling) -> (ids, seconds, seconds to the first id or None)
Answer = Callable[[list[int], int, dict[str, Any] | None], tuple[list[int], float, float | None]]


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """`start(settings)` returns what to tell of itself, and `answer(ids, limit, sampling) -> (ids, seconds, first)`."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints, even from C, belongs to the log

    def say(line: dict[str, Any]) -> None:
        protocol.write(json.dumps(line) + "\n")
        protocol.flush()

    about, answer = start(json.loads(sys.argv[1]))
    say({"ready": about})
    for line in sys.stdin:
        asked = json.loads(line)
        ids, seconds, first = answer(asked["ids"], asked["limit"], asked["sampling"])
        time.sleep(SETTLE)
        say({"ids": ids, "seconds": seconds, "first_token_seconds": seconds if first is None else first})
