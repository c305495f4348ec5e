"""What `generate` returns beside the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from medusa_apar.engine.stats import Stats, ThreadAgreement
from medusa_apar.events import Event
from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import ParagraphTree


@dataclass
class MedusaAparOutput(GenerateDecoderOnlyOutput):
    """transformers' own output with `stats` and one `paragraph_tree` per row; notebooks show it as a picture.

    agreement: with rescore=True, per row and thread of its paragraph tree; None otherwise.
    events: everything that happened, step by step; `recording` is what it adds up to. With `regenerate_below` both are
        of the answer as first written.
    """

    sequences: torch.Tensor  # type: ignore[assignment]
    scores: tuple[torch.Tensor, ...] | None = None  # type: ignore[assignment]
    logits: tuple[torch.Tensor, ...] | None = None  # type: ignore[assignment]
    stats: Stats | None = None
    paragraph_tree: list[ParagraphTree] | None = None
    agreement: list[list[ThreadAgreement]] | None = None
    events: list[Event] | None = field(default=None, repr=False)
    tokenizer = cast(Any, None)  # the model's, where it is known; without annotation it is not one of the entries

    @cached_property
    def recording(self) -> Recording:
        return Recording.of(self.events or ())

    def _repr_html_(self) -> str | None:
        from medusa_apar.display import answer

        return answer(self).html if self.events else None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython prints where it shows no picture."""
        from medusa_apar.display import answer

        printer.text(answer(self).text if self.events else repr(self))
