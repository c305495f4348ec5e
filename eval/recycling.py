"""What token recycling brings beside draft heads and n-grams, in tokens per step, and whether chances come true.

  python -m medusa_apar.eval.recycling --prompts vicuna=vicuna_bench.jsonl mt=mt_bench.jsonl --limit 24 --out DIR

Every prompt (first turn) is answered greedily by each system with each number of nodes a thread. A table of recycled
tokens is filled from all nodes, wrong ones too, and what the model says behind a wrong one no answer tells: so the
nodes run, in contrast to `replay.py`. Each answer has an engine of its own, which knows nothing yet, as in `generate`.
All systems have to write the same tokens, or the run fails.

accepted    tokens a thread gains in a step, the model's own token included
per step    visible tokens of an answer over its steps, the prompt's own step included; mean over answers
promised    sum of the chances of the nodes that ran, over how many of them were right, by who proposed them

Answers that loop stand in none of these figures; in brackets are those of all. runs.jsonl gets a line per answer, so
that a killed run goes on where it stopped. Steps, tokens and chances are counted, nothing is timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import numpy as np

from medusa_apar.arguments import number
from medusa_apar.attaching import attach
from medusa_apar.checks import expected_acceptance
from medusa_apar.drafting.advance import DraftResult
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.speculator import Speculator
from medusa_apar.generate import MedusaApar
from medusa_apar.job import write_text
from medusa_apar.loading import load
from medusa_apar.models.chat import encode_messages
from medusa_apar.threads.paragraph_tree import Thread

from .answering import answer
from .loops import LOOPS, looping_share
from .questions import Question, read_questions
from .runs import Runs
from .weights import MAX_THREADS, named_file

CANDIDATES = 32  # guesses of the heads below each root, at least
# Whether there are heads, and what is guessed besides.
SYSTEMS = {
    "heads": (True, Speculation(thread_weights=False, ngrams=False)),
    "heads+ngrams": (True, Speculation(thread_weights=False)),
    "heads+recycling": (True, Speculation(thread_weights=False, ngrams=False, recycling=True)),
    "all": (True, Speculation(thread_weights=False, recycling=True)),
    "ngrams": (False, Speculation(thread_weights=False)),
    "recycling": (False, Speculation(thread_weights=False, ngrams=False, recycling=True)),
    "ngrams+recycling": (False, Speculation(thread_weights=False, recycling=True)),
}
SOURCES = ("heads", "ngrams", "recycled")


@contextmanager
def promises() -> Iterator[dict[str, Counter[str]]]:
    """Counts, as long as it is entered, the chances of draft nodes and how many of them were right, by source."""
    found: dict[str, Counter[str]] = {"promised": Counter(), "right": Counter()}
    learn = Speculator.learn

    def counted(self: Speculator, result: DraftResult, thread: Thread) -> None:
        if thread.live and not thread.ends_with_forced:
            proposal, kept = result.proposal, result.kept[: result.num_candidates]
            start = 0
            for source, count in proposal.sources(kept).items():
                chances = float(proposal.chances[kept[start : start + count]].sum())
                found["promised"][source] += chances  # type: ignore[assignment]  # a counter of shares
                start += count
            found["right"].update(proposal.sources(result.kept[np.array(result.nodes, dtype=np.int64)]))
        learn(self, result, thread)

    with patch.object(Speculator, "learn", counted):
        yield found


def speculating(apar: MedusaApar, system: str, nodes: int, fork: bool, quantize: str | None) -> MedusaApar:
    """The model with a system's guesses, of which each thread has so many as nodes whatever they cost."""
    has_heads, speculation = SYSTEMS[system]
    heads = apar.heads if has_heads else None
    made = attach(
        *(apar.model, heads, apar.control_token_ids),
        tokenizer=apar.tokenizer,
        speculation=speculation,
        draft_tree=DraftTree.likeliest(max(CANDIDATES, nodes), expected_acceptance(heads)),
        budget=(nodes + 1) * (MAX_THREADS if fork else 1),
        quantize=quantize,
    )
    made.runtime.facts = replace(made.runtime.facts, max_nodes=nodes)
    return made


def run(apar: MedusaApar, questions: Sequence[Question], runs: Runs, args: argparse.Namespace) -> None:
    """Answers what is not answered yet. RuntimeError where a system writes another text than those before it."""
    texts = {(row["fork"], row["set"], row["id"]): row["ids"] for row in runs.rows.values()}
    for system in args.systems:
        for nodes in args.nodes:
            todo = [q for q in questions if (args.heads, system, nodes, args.fork, q.set, q.id) not in runs]
            made = speculating(apar, system, nodes, args.fork, args.quantize) if todo else apar
            for question in todo:
                prompt = encode_messages(apar.tokenizer, question.messages)["input_ids"][0].tolist()
                with promises() as found:
                    [record] = answer(made, [prompt], args.max_new_tokens, args.fork)
                ids = record["ids"]
                if texts.setdefault((args.fork, question.set, question.id), ids) != ids:
                    raise RuntimeError(f"{system} with {nodes} nodes has answered {question.id} otherwise")
                counts = {name: record[name] for name in ("ids", "steps", "thread_steps", "gained")}
                row = {
                    "heads": args.heads,
                    "system": system,
                    "nodes": nodes,
                    "fork": args.fork,
                    "set": question.set,
                    "id": question.id,
                }
                runs.add([row | counts | found | {"looping": looping_share(ids)}])
            if todo:
                print(f"{system}, {nodes} nodes: {len(todo)} answers", flush=True)


def table(runs: Runs) -> list[str]:
    """Lines of Markdown, a row for each system, number of nodes and prompt set."""
    groups: dict[tuple[bool, str, int, str, str], list[dict[str, Any]]] = {}
    for row in runs.rows.values():
        groups.setdefault((row["fork"], row["set"], row["nodes"], row["system"], row["heads"]), []).append(row)
    order = {name: place for place, name in enumerate(SYSTEMS)}
    promised = " | ".join(f"{source} promised" for source in SOURCES)
    lines = [
        f"| threads | prompts | nodes | system | heads | accepted | per step | {promised} |",
        "|---" * (7 + len(SOURCES)) + "|",
    ]
    for key in sorted(groups, key=lambda key: (*key[:3], order[key[3]], key[4])):
        fork, name, nodes, system, heads = key
        rows = groups[key]
        calm = [row for row in rows if row["looping"] <= LOOPS]
        cells = [f"{plain} ({every})" for plain, every in zip(_figures(calm), _figures(rows), strict=True)]
        counted = f"{name} ({len(calm)} of {len(rows)})"
        lines.append(f"| {'yes' if fork else 'no'} | {counted} | {nodes} | {system} | {heads} | {' | '.join(cells)} |")
    return lines


def _figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["-"] * (2 + len(SOURCES))
    accepted = sum(row["gained"] for row in rows) / sum(row["thread_steps"] for row in rows)
    found = [f"{accepted:.3f}", f"{fmean(len(row['ids']) / row['steps'] for row in rows):.3f}"]
    for source in SOURCES:
        promised, right = (sum(row[what].get(source, 0) for row in rows) for what in ("promised", "right"))
        found.append(f"{promised / right:.2f} of {right}" if right else "-")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="medusa_apar.eval.recycling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="smollm2-135m", help="tuned model: name or folder (default: %(default)s)")
    add("--heads", default="auto", metavar="NAME|DIR", help="as `load` takes them (default: the model's own)")
    add("--prompts", nargs="+", type=named_file, required=True, metavar="NAME=FILE", help="JSONL with `turns`")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    add("--nodes", nargs="+", type=number(int, 1), default=[8, 24, 64], metavar="N", help="default: 8 24 64")
    add("--fork", action="store_true", help="with threads (default: each answer is one)")
    add("--quantize", choices=("int8",), help="default: float32")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="default: %(default)s")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N prompts of every set")
    add("--every", type=number(int, 1), default=1, metavar="N", help="only every Nth prompt (default: all)")
    add("--out", type=Path, required=True, metavar="DIR", help="gets runs.jsonl and table.md")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    questions = [
        question for name, path in args.prompts for question in read_questions(name, path)[:: args.every][: args.limit]
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.out / "runs.jsonl", ("heads", "system", "nodes", "fork", "set", "id"))
    run(load(args.model, heads=args.heads, quantize=args.quantize), questions, runs, args)
    lines = table(runs)
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
