"""A tiny model that was taught to write lists: what forking by rule is tested with.

Its weights are files, for a training run ends elsewhere on every processor, and what a test finds in its answers with
it. `python -m tests.support.list_writer` trains them anew.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.models import CONFIGS, EOS
from tests.support.tokenizers import ID, LIST_WORDS, TITLES

WEIGHTS = Path(__file__).parent / "list_writer"
FAMILIES = "llama", "wide_llama"


def _answer(draw: random.Random) -> list[str]:
    """A list of three to eight items, most with a line of detail, some with bullets; half of them with a last word."""
    words = lambda least, most: [draw.choice(LIST_WORDS) for _ in range(draw.randint(least, most))]  # noqa: E731
    pieces = [*words(3, 3), ".", "\n\n"]
    title, numbered, last = draw.randrange(len(TITLES)), draw.random() < 0.7, draw.randint(3, 8)
    line_break = draw.choice([["\n"], ["\n\n"]])
    for item in range(1, last + 1):
        pieces += [str(item), "."] if numbered else ["-"]
        pieces.append(TITLES[(title + item) % len(TITLES)])
        nested = [":\n", "  ", " -", *words(2, 2), "\n", "  ", " -", *words(1, 1)]
        pieces += nested if draw.random() < 0.15 else [":", *words(2, 7)]
        glued = item < last and line_break == ["\n"] and draw.random() < 0.2
        pieces += [".\n"] if glued else [".", *(line_break if item < last else [])]
    return pieces + (["\n\n", *words(4, 4), "."] if draw.random() < 0.5 else [])


@cache
def list_writer(family: str = "llama") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    state = load_file(WEIGHTS / f"{family}.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    return model.eval()


def list_prompts(rows: int) -> dict[str, torch.Tensor]:
    """How different answers begin, left-padded by 0, 1, 2, ..."""
    draw = random.Random(7)
    ids = torch.tensor([[*(ID[draw.choice(LIST_WORDS)] for _ in range(3 + rows)), 7, 6] for _ in range(rows)])
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def train(family: str, seed: int = 1, steps: int = 350) -> PreTrainedModel:
    """Trained in seconds; then its words and titles are made less alike, so that greedy answers vary too."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        stream: list[list[int]] = []
        for _ in range(16):
            row: list[int] = []
            while len(row) < 64:
                row += [*map(ID.__getitem__, _answer(draw)), EOS]
            stream.append(row[:64])
        ids = torch.tensor(stream)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rows = model.get_output_embeddings().weight[ID[TITLES[0]] :]
        rows += 0.25 * rows.std() * torch.randn(rows.shape)
    return model


if __name__ == "__main__":
    WEIGHTS.mkdir(exist_ok=True)
    for family in FAMILIES:
        state = {name: weight.bfloat16().contiguous() for name, weight in train(family).state_dict().items()}
        save_file(state, WEIGHTS / f"{family}.safetensors")
