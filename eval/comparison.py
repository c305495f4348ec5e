"""What `ours` brings against every other system of a benchmark, and whether any question pays for it.

  medusa-apar bench --systems hf ours-ar threads heads ours llama.cpp-q4_1 llama.cpp-q8_0 openvino --repeat 3 --out DIR
  python -m medusa_apar.eval.comparison DIR

Writes DIR/comparison.md, as `medusa-apar bench` does itself. All figures are tokens per second: whose answers split
are other texts than those that do not, and so are sampled ones. The best of several systems is the one that was best
on that very question, so that chance helps it more than `ours`: three repeats or more say whether a question is slower,
since it is judged by the median of its repeats' tokens per second. Questions to which a system wrote nothing are left
out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medusa_apar.job import write_text

from .bench import Median, is_sampled, medians, results_of
from .loops import LOOPS
from .plan import RESULTS, decoding_of
from .runs import Runs
from .speculation import sentence
from .statistics import speed_ratio

FILE = "comparison.md"
OURS = "ours"
PARTS = ("ours-ar", "threads", "heads")  # a question may choose the best of them
TOGETHER = {"llama.cpp": ("llama.cpp-q4_1", "llama.cpp-q8_0")}  # of which the better one counts
ENOUGH = 3  # repeats that tell a slower question from a busy moment

Found = dict[str, list[Median]]


def text(found: Found, repeats: int, ours: str = OURS, about: str = "") -> str:
    """Both as Markdown, below a sentence `about` the answers; ValueError where `ours` or whatever it could be compared
    with is missing."""
    if ours not in found or len(found) < 2:
        raise ValueError(f"a comparison needs answers of {ours} and of another system; there are {', '.join(found)}")
    empty = dict.fromkeys(m.prompt for answers in found.values() for m in answers if not m.rate)
    found = {name: [m for m in answers if m.prompt not in empty] for name, answers in found.items()}
    if not found[ours]:
        raise ValueError("a comparison needs a question to which every system wrote something, and there is none")
    lines = [about, ""] if about else []
    if empty:
        lines += [f"Left out, as a system wrote nothing: {', '.join(empty)}.", ""]
    lines += ratios(found, ours)
    parts = [name for name in PARTS if name in found and name != ours]
    if parts:
        slower = f"{sentence(by_question(found, ours, parts), ours, *parts, unit=' a token')} {_often(repeats)}"
        lines += ["", slower]
    return "\n".join(lines) + "\n"


def _often(repeats: int) -> str:
    if repeats >= ENOUGH:
        return f"({repeats} repeats.)"
    return f"({repeats} repeat{'s' * (repeats > 1)}: a busy moment looks the same; take --repeat {ENOUGH}.)"


def ratios(found: Found, ours: str) -> list[str]:
    """A table: tokens per second of `ours` over those of each other system, on all questions and without loops."""
    loops = {m.prompt for answers in found.values() for m in answers if m.row["looping"] > LOOPS}
    count = len(found[ours])
    lines = [
        f"Tokens per second of `{ours}` against each system's (95 % bootstrap interval over questions).",
        "",
        f"| against | all ({count}) | without loops ({count - len(loops)}) |",
        "|---|---|---|",
    ]
    for name, members in _rivals(found, ours).items():
        cells = [_against(found, ours, members, without) for without in (set(), loops)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _rivals(found: Found, ours: str) -> dict[str, list[str]]:
    """What `ours` is held against, by name: one system each, or several of which the better one counts."""
    names = {member: name for name, members in TOGETHER.items() for member in members}
    rivals: dict[str, list[str]] = {}
    for name in found:
        if name != ours:
            rivals.setdefault(names.get(name, name), []).append(name)
    return {name if len(members) > 1 else members[0]: members for name, members in rivals.items()}


def _against(found: Found, ours: str, members: list[str], without: set[str]) -> str:
    """The ratio to the fastest of the members, named where there are several; "-" where no question is left."""
    chosen = {name: [m for m in found[name] if m.prompt not in without] for name in [ours, *members]}
    if not chosen[ours]:
        return "-"
    best = max(members, key=lambda name: _speed(chosen[name]))
    own, its = ([(m.tokens, m.seconds) for m in chosen[name]] for name in (ours, best))
    ratio = speed_ratio(own, its)
    which = f", {best}" if len(members) > 1 else ""
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}{which})"


def _speed(answers: list[Median]) -> float:
    return sum(m.tokens for m in answers) / sum(m.seconds for m in answers)


def by_question(found: Found, ours: str, parts: list[str]) -> list[tuple[str, float]]:
    """Each question with the time of a token of `ours` over that of the best of `parts`, the worst first."""
    best = [max(answer.rate for answer in answers) for answers in zip(*(found[name] for name in parts), strict=True)]
    slower = [(m.prompt, speed / m.rate) for m, speed in zip(found[ours], best, strict=True)]
    return sorted(slower, key=lambda entry: -entry[1])


def write(folder: Path, results: Runs, names: Sequence[str], repeats: int, ours: str = OURS) -> str:
    """comparison.md of the first so many repeats of each answer of these systems; returns it."""
    with results_of(results.path):
        rows = [row for row in results.rows.values() if row["repeat"] < repeats and row["system"] in names]
        about = f"Answers are {decoding_of(folder)}." if is_sampled(rows) else ""
        said = text(medians(rows, names), repeats, ours, about)
    write_text(folder / FILE, said)
    return said


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.comparison", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a benchmark")
    parser.add_argument("--system", default=OURS, metavar="SYSTEM", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not (args.folder / RESULTS).is_file():
        parser.error(f"{args.folder} holds no {RESULTS}")
    try:
        results = Runs(args.folder / RESULTS, ("system", "prompt", "repeat"))
        names = list(dict.fromkeys(system for system, _, _ in results.rows))
        with results_of(results.path):
            repeats = 1 + max((repeat for _, _, repeat in results.rows), default=0)
        print(write(args.folder, results, names, repeats, args.system), end="")
    except (ValueError, IndexError, OSError) as error:
        parser.error(f"{args.folder}: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
