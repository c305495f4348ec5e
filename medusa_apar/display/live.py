"""Threads side by side in a notebook while they grow."""

from __future__ import annotations

import math
import time
from typing import Any

from medusa_apar.events import Event, StepFinished, StepStarted
from medusa_apar.events.recording import Recording

from .lanes_picture import frame
from .pieces import Pieces
from .terminal import FRAME_SECONDS


class LiveView:
    """A consumer of events that draws lanes below the running cell: `generate(..., events=LiveView(tokenizer))`.

    Guesses stand in grey while they are checked, then bold if they were right and struck if not. It updates one output
    through IPython's display protocol, so that JupyterLab, Notebook and VS Code show it growing, and a saved notebook
    or a static export keeps the last frame.

    Args:
        row: of the batch, whose threads are shown.
        step_seconds: how long a step is held for eyes to follow, half of it with its guesses and half with what became
            of them; 0 draws some ten frames a second of what is going on anyway.

    Raises RuntimeError where no notebook listens.
    """

    def __init__(self, tokenizer: Any, row: int = 0, step_seconds: float = 0.0):
        self.recording = Recording()
        self._row, self._hold = row, step_seconds / 2
        self._pieces = Pieces(tokenizer)
        self._handle = _new_output()
        self._drawn = -math.inf

    def __call__(self, event: Event) -> None:
        self.recording(event)
        if not isinstance(event, (StepStarted, StepFinished)):
            return
        over = isinstance(event, StepFinished) and not any(tree.live for tree in self.recording.trees)
        if not over and not self._hold and time.perf_counter() - self._drawn < FRAME_SECONDS:
            return
        self._handle.update(frame(self.recording, self._row, self._pieces))
        self._drawn = time.perf_counter()
        if self._hold and not over:
            time.sleep(self._hold)


def _new_output() -> Any:
    try:
        from IPython.core.getipython import get_ipython
        from IPython.display import HTML, display
    except ImportError as error:
        raise RuntimeError("LiveView needs a notebook: pip install 'medusa-apar[notebooks]'.") from error
    if getattr(get_ipython(), "kernel", None) is None:
        raise RuntimeError("LiveView draws in a notebook; a terminal has medusa_apar.display.terminal.Lanes.")
    return display(HTML("waiting for the first step …"), display_id=True)
