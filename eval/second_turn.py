"""What share of a chat's second turn the prefix cache has:  python -m medusa_apar.eval.second_turn [--quantize int8]

Asks each question, then, with that and the answer in front, one more, with forks and without. The second turn is a text
in reading order, and what was computed are paths, which part from it at an answer's first fork: so the cache has the
first turn's prompt and the answer up to there. Of the second prompt's tokens `cached` came from the cache;
`before_fork` are those that are first prompt and answer up to the first fork (all of it, where there is none), as far
as the tokenizer cuts the text as the model wrote it; `first_prompt` are the first prompt's. A share is of all tokens of
the second prompt.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medusa_apar.arguments import number
from medusa_apar.engine.engine import Engine
from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine, quiet, write_text
from medusa_apar.loading import load
from medusa_apar.models.chat import Message, encode_messages
from medusa_apar.threads.request import Request

from . import prompts
from .prompts import Prompt

FOLLOW_UP = "Can you say that in fewer words?"
MODES = {"forks": "auto", "one thread": "off"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A second turn. prompt: its tokens, of which so many are cached, before_fork, first_prompt. answer, forks: of the
    first turn, its tokens and threads beside the trunk."""

    id: str
    prompt: int
    cached: int
    before_fork: int
    first_prompt: int
    answer: int
    forks: int

    @property
    def share(self) -> float:
        return self.cached / self.prompt


def measure(apar: MedusaApar, questions: Sequence[Prompt], limit: int) -> dict[str, list[Turn]]:
    """By mode, each question's second turn. limit: tokens of a first answer, at most."""
    found = {}
    for mode, fork in MODES.items():
        with apar.engine(prefix_cache=True) as engine:
            found[mode] = [_asked(apar, engine, question, fork, limit) for question in questions]
    return found


def _asked(apar: MedusaApar, engine: Engine, question: Prompt, fork: str, limit: int) -> Turn:
    """Nothing of other questions counts: each has a salt of its own."""
    tokenizer: Any = apar.tokenizer

    def answered(messages: list[Message], most: int) -> Request:
        ids = encode_messages(tokenizer, messages)["input_ids"][0].tolist()
        request = apar.request("turn", ids, max_new_tokens=most, fork=fork, cache_salt=f"question {question.id}")
        engine.add(request)
        while engine.unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
        return request

    asked: list[Message] = [{"role": "user", "content": question.text}]
    first = answered(asked, limit)
    text = tokenizer.decode(first.text_ids, skip_special_tokens=True)
    said: list[Message] = [{"role": "assistant", "content": text}, {"role": "user", "content": FOLLOW_UP}]
    second = answered([*asked, *said], 1)
    trunk = first.tree.trunk
    until = trunk.children[0].fork_index if trunk.children else len(trunk.tokens)
    before_fork, first_prompt = (
        len(os.path.commonprefix([ids, second.prompt_ids])) for ids in (trunk.tokens[:until], first.prompt_ids)
    )
    forks = len(first.tree.threads) - 1
    counts = (second.stats.cached_tokens, before_fork, first_prompt, len(first.text_ids), forks)
    return Turn(question.id, len(second.prompt_ids), *counts)


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Shares of all tokens of all second prompts, and of each question's, the mean."""
    whole = sum(turn.prompt for turn in turns)
    shares = {
        name: sum(getattr(turn, name) for turn in turns) / whole for name in ("cached", "before_fork", "first_prompt")
    }
    mean = sum(turn.share for turn in turns) / len(turns)
    forked = sum(turn.forks > 0 for turn in turns)
    return {"share": shares, "mean_share": mean, "questions": len(turns), "forked": forked, "prompt_tokens": whole}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("medusa_apar.eval.second_turn", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="as `medusa_apar.load` takes it (default: %(default)s)")
    add("--quantize", choices=["int8"], help="weights in 8 bits (CPU)")
    add("--prompts", default=prompts.DEFAULT, help="a set of `bench`, or a file (default: %(default)s)")
    add("--limit", type=number(int, 1), help="questions (default: all)")
    add("--max-new-tokens", type=number(int, 1), default=256, help="of a first answer (default: %(default)s)")
    add("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args(arguments)
    quiet()
    questions = prompts.read(args.prompts, args.limit)
    apar = load(args.model, quantize=args.quantize)
    found = measure(apar, questions, args.max_new_tokens)
    told = {mode: summary(turns) for mode, turns in found.items()}
    options = {name: value for name, value in vars(args).items() if name != "out"}
    about = {**machine(), "runs on": apar.runtime.description, "options": options, "follow_up": FOLLOW_UP}
    print(json.dumps({**about, **told}, indent=1))
    if args.out is not None:
        turns = {mode: [asdict(turn) | {"share": turn.share} for turn in its] for mode, its in found.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps({**about, "found": told, "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
