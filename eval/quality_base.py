"""How likely the untuned base finds an answer, token by token, and which tokens are seams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job
from medusa_apar.models.chat import encode
from medusa_apar.models.families import context_length
from medusa_apar.models.fingerprint import fingerprint

from .answering import answer_logits
from .runs import Runs

SCORES = "scores.jsonl"
SEAM = 8  # tokens of a thread from its first on, before which it has read nothing of its own
Spans = Sequence[Sequence[int]]  # [begin, end) in an answer's text


@dataclass(slots=True)
class Scores:
    """An answer's tokens as the base's own tokenizer cuts it: where each begins in the text, and its log-probability.

    They are natural logs, of the model's own distribution behind its chat prompt and the answer so far. An answer that
    the model's context does not hold is scored as far as it does.
    """

    begins: list[int]
    logprobs: list[float]

    def likelihood(self, parts: Sequence[Spans]) -> dict[str, float | None]:
        """Mean log-probabilities: of all tokens, of the seams, and of the rest; None where there are none.

        parts: the text of every thread but the trunk. Its seam is the first `SEAM` tokens that begin in it.
        """
        seams = seam_places(self.begins, parts)
        seam = [value for place, value in enumerate(self.logprobs) if place in seams]
        rest = [value for place, value in enumerate(self.logprobs) if place not in seams]
        both = (("likelihood", self.logprobs), ("likelihood_seam", seam), ("likelihood_rest", rest))
        return {name: fmean(values) if values else None for name, values in both}


def seam_places(begins: Sequence[int], parts: Sequence[Spans]) -> set[int]:
    """The tokens, by their number, that are seams."""
    found: set[int] = set()
    for spans in parts:
        own = (place for place, begin in enumerate(begins) if any(first <= begin < last for first, last in spans))
        found.update(place for place, _ in zip(own, range(SEAM), strict=False))
    return found


class BaseScores:
    """Scores by the untuned base. Equal answers to a question are scored once, and what has been scored is on disk."""

    def __init__(self, folder: Path, base: MedusaApar) -> None:
        self.runs = Runs(folder / SCORES, ("base", "asked"))
        self.model, self.tokenizer = base.model, base.tokenizer
        self.name = fingerprint(base.model)[:12]

    def score(self, job: Job, answers: Sequence[tuple[str, str]]) -> list[Scores]:
        """Of (prompt, answer) pairs, in order."""
        keys = [(self.name, _digest(*pair)) for pair in answers]
        todo = {key: pair for key, pair in zip(keys, answers, strict=True) if key not in self.runs}
        with job.bar("likelihood", len(set(keys)), len(set(keys)) - len(todo)) as bar:
            for (_, asked), (prompt, text) in todo.items():
                its = self._scores(prompt, text)
                row = {"begins": its.begins, "logprobs": [round(value, 5) for value in its.logprobs]}
                self.runs.add([{"base": self.name, "asked": asked, **row}])
                bar.advance()
        rows = [self.runs.rows[key] for key in keys]
        return [Scores(row["begins"], row["logprobs"]) for row in rows]

    def _scores(self, prompt: str, text: str) -> Scores:
        tokenizer: Any = self.tokenizer
        before = encode(tokenizer, prompt)["input_ids"][0].tolist()
        cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        context = context_length(self.model)
        room = None if context is None else max(context - len(before), 0)
        ids, begins = cut["input_ids"][:room], [begin for begin, _ in cut["offset_mapping"]][:room]
        if not ids:
            return Scores([], [])
        logprobs = answer_logits(self.model, before + ids, len(before)).log_softmax(-1)
        return Scores(begins, [float(logprobs[place, token]) for place, token in enumerate(ids)])


def _digest(prompt: str, text: str) -> str:
    return hashlib.sha256(json.dumps([prompt, text]).encode()).hexdigest()[:32]
