"""`medusa-apar data`: corpora in, examples.jsonl and a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_apar.job import Job

from .corpus import BadCorpus, Drops, Example, read_examples, write_examples
from .rules import Thread, show, splice

EXAMPLES = "examples.jsonl"


def make_examples(
    job: Job,
    corpora: Sequence[str],
    *,
    skip_bad: bool,
    all_turns: bool,
    max_depth: int,
    agree_with: Sequence[Path],
    keep_whole: bool = False,
    loops: bool = False,
    show_count: int,
) -> dict[str, Any]:
    """Writes the examples of `corpora` into the job's folder and returns the report.

    keep_whole: an answer that would fork where the one of `agree_with` does not becomes one thread, instead of being
    left out.
    loops: the looping answers are kept, as what to avoid, and no others.
    BadCorpus where a record cannot be read and is not to be skipped, or where no example is left.
    """
    drops = Drops(skip_bad)
    seen: set[int] = set()
    others_drops = Drops(skip_bad)
    others = read_examples(agree_with, others_drops, all_turns=all_turns, max_depth=max_depth)
    forms = {example.id: bool(example.tree.forks) for example in others}
    if agree_with and not forms:
        raise BadCorpus(f"{', '.join(map(str, agree_with))} holds no usable answer to agree with")
    kinds: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    depths: Counter[int] = Counter()
    totals: Counter[str] = Counter()

    def kept() -> Iterator[Example]:
        for corpus in corpora:
            with job.bar(Path(corpus).name, None) as bar:
                counts = kinds.setdefault(corpus, Counter())
                for example in read_examples(
                    [corpus], drops, all_turns=all_turns, max_depth=max_depth, seen=seen, loops=loops
                ):
                    bar.advance()
                    if forms and example.id not in forms:
                        drops.add("not in the other corpus", example.id)
                        continue
                    if forms and keep_whole and example.tree.forks and not forms[example.id]:
                        example = replace(
                            example, tree=Thread([splice(example.tree)]), kind="plain", reason="other corpus whole"
                        )
                    if forms and forms[example.id] != bool(example.tree.forks):
                        drops.add(
                            "forks, the other corpus does not" if example.tree.forks else "whole, the other forks",
                            example.id,
                        )
                        continue
                    if example.tree.forks and show_count > totals["forking"]:
                        job.say(f"--- {example.id} ({example.kind})\n{show(example.tree)}\n")
                    counts[example.kind] += 1
                    depths[example.tree.depth] += 1
                    totals["examples"] += 1
                    totals["forking"] += example.tree.forks > 0
                    totals["forks"] += example.tree.forks
                    totals["answer_words"] += len(splice(example.tree).split())
                    if example.reason:
                        reasons[example.reason] += 1
                    yield example

    examples = job.folder / EXAMPLES
    write_examples(examples, kept())
    if not totals["examples"]:
        examples.unlink()
        reason = ", ".join(f"{count} {name}" for name, count in drops.counts.items()) or "the corpora are empty"
        raise BadCorpus(f"no example is left: {reason}")
    report = job.report(
        **totals,
        kinds={corpus: dict(counts.most_common()) for corpus, counts in kinds.items()},
        whole=dict(reasons.most_common()),
        depths={str(depth): count for depth, count in sorted(depths.items())},
        dropped=drops.as_report(),
        agree_with_dropped=others_drops.as_report(),
    )
    job.log("end", **totals)
    job.say(_summary(report))
    return report


def _summary(report: dict[str, Any]) -> str:
    lines = [f"{report['examples']} examples, {report['forking']} of them fork ({report['forks']} forks)"]
    for corpus, kinds in report["kinds"].items():
        lines.append(f"  {Path(corpus).name}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    lines.append("whole: " + ", ".join(f"{count} {reason}" for reason, count in report["whole"].items()))
    for name, what in (("dropped", "dropped"), ("agree_with_dropped", "dropped of --agree-with")):
        for reason, entry in report[name].items():
            lines.append(f"{what}: {entry['count']} {reason}, first {entry['first'][0]}")
    return "\n".join(lines)
