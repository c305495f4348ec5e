"""A peer's process: JSON lines in, JSON lines out (`peers_workers/serve.py` is the other end)."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from medusa_apar.requests import Sampling

PATIENCE = 20.0  # seconds for a worker to end by itself once its input is closed


class Worker:
    """A script that answers prompts, run by a Python that has nothing of ours.

    `about` is what it said of itself when it was ready. RuntimeError, naming the log, whenever it stops or answers
    nonsense.
    """

    def __init__(self, name: str, command: list[str], log: Path, variables: dict[str, str]) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    env={**os.environ, **variables},
                    text=True,
                    encoding="utf-8",
                )
            except OSError as error:
                raise RuntimeError(f"{name} cannot be started ({error})") from error
        try:
            self.about: dict[str, Any] = self._read("starting")["ready"]
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{name} is ready: {json.dumps(self.about)}\n")
        except BaseException:  # Ctrl-C while an engine compiles, too
            self.close()
            raise

    def ask(self, ids: list[int], limit: int, sampling: Sampling) -> dict[str, Any]:
        """The worker's `ids`, `seconds` and `first_token_seconds`."""
        asked: dict[str, Any] = {"ids": ids, "limit": limit, "sampling": None}
        if sampling.temperature:
            asked["sampling"] = {name: getattr(sampling, name) for name in ("temperature", "top_p", "seed")}
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(OSError):  # if it died since its last answer, reading says so
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
        return self._read("answering")

    def _read(self, doing: str) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line.endswith("\n"):
            code = self._process.wait()
            raise RuntimeError(f"{self.name} stopped while {doing} (exit code {code}): see {self.log}")
        try:
            said: dict[str, Any] = json.loads(line)
            return said
        except ValueError:
            raise RuntimeError(f"{self.name} said {line[:80]!r} while {doing}: see {self.log}") from None

    def close(self) -> None:
        """Ends the process, by force if need be."""
        assert self._process.stdin is not None
        with suppress(OSError):  # what was not flushed has no reader any more
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
