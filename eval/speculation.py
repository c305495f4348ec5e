"""What each part of speculation brings, and whether any prompt pays for it: from a benchmark's results.

  medusa-apar bench --systems threads static budget budget+weighted budget+forks budget+ngrams ours --out DIR
  python -m medusa_apar.eval.speculation DIR

Writes DIR/speculation.md, each system against `static` (Medusa's: the same tree below every thread), and
DIR/by_prompt.png, each prompt's time with `ours` against the same threads without drafting, system `threads`. Two
systems that sampled other texts are compared by neither time nor steps, as one text is longer than the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medusa_apar.job import write_text

from .bench import Median, is_sampled, medians, results_of
from .loops import LOOPS
from .plan import RESULTS
from .runs import Runs
from .statistics import ratio_of_totals

SLOWER = 0.03  # share of its time that a prompt may lose (CONTRIBUTING, promise 7: never slower)
SOURCES = ("heads", "ngrams", "recycled", "forks")


def read(folder: Path) -> dict[str, list[Median]]:
    rows = list(Runs(folder / RESULTS, ("system", "prompt", "repeat")).rows.values())
    names = list(dict.fromkeys(row["system"] for row in rows if row.get("rows") is not None))
    return medians(rows, names)


def other_texts(answers: list[Median], base: list[Median]) -> bool:
    """Whether the two sampled, and not the same token ids everywhere."""
    if not is_sampled([m.row for m in (*answers, *base)]):
        return False
    return any(None in a.texts or a.texts != b.texts for a, b in zip(answers, base, strict=True))


def ablation(found: dict[str, list[Median]], against: str) -> list[str]:
    """Lines of Markdown: all prompts, and those on which no system's answer loops."""
    loops = {m.prompt for answers in found.values() for m in answers if m.row["looping"] > LOOPS}
    prompts = len(found[against])
    lines = [
        f"Against `{against}`; {prompts} prompts, in brackets the {prompts - len(loops)} that loop in no system. "
        "Right: nodes that were accepted of those that were drafted, by who proposed them.",
        "",
        f"| system | tokens per step | rows per step | steps saved | as soon done | {' | '.join(SOURCES)} right |",
        "|---" * (5 + len(SOURCES)) + "|",
    ]
    others = [name for name, answers in found.items() if other_texts(answers, found[against])]
    for name, answers in found.items():
        parts = [
            _figures(answers, found[against], set()),
            _figures(answers, found[against], loops) if prompts > len(loops) else ["-"] * 4,
        ]
        cells = [f"{whole} ({plain})" for whole, plain in zip(*parts, strict=True)]
        if name in others:
            cells[2:] = ["-", "-"]
        lines.append(f"| {name} | {' | '.join([*cells, *(_right(answers, source) for source in SOURCES)])} |")
    if others:
        lines += ["", f"{_named(others)} sampled other texts than `{against}`: tokens per step compare them, not time."]
    return lines


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _figures(answers: list[Median], base: list[Median], without: set[str]) -> list[str]:
    pairs = [pair for pair in zip(answers, base, strict=True) if pair[0].prompt not in without]
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    steps = sum(m.row["steps"] for m in ours)
    saved = 1 - steps / sum(m.row["steps"] for m in theirs)
    soon = ratio_of_totals([m.seconds for m in theirs], [m.seconds for m in ours])
    return [
        f"{sum(m.tokens for m in ours) / steps:.2f}",
        f"{sum(m.row['rows'] for m in ours) / steps:.1f}",
        f"{saved:.0%}",
        f"{soon.value:.2f}x, {soon.low:.2f} to {soon.high:.2f}",
    ]


def _right(answers: list[Median], source: str) -> str:
    drafted, accepted = (sum(m.row[what].get(source, 0) for m in answers) for what in ("drafted", "accepted"))
    return f"{accepted} of {drafted}" if drafted else "-"


def by_prompt(found: dict[str, list[Median]], ours: str, plain: str) -> list[tuple[str, float]]:
    """Each prompt with its time under `ours` over that under `plain`, the worst first."""
    ratios = [(a.prompt, a.seconds / b.seconds) for a, b in zip(found[ours], found[plain], strict=True)]
    return sorted(ratios, key=lambda entry: -entry[1])


def sentence(ratios: list[tuple[str, float]], ours: str, *plain: str, unit: str = "") -> str:
    """How many prompts are slower under `ours` than under `plain`, or the best of several; `unit`: of what ratios are,
    if not of whole answers."""
    slower = [prompt for prompt, ratio in ratios if ratio > 1 + SLOWER]
    worst, ratio = ratios[0]
    which = f"{len(slower)} of {len(ratios)} prompts ({', '.join(slower)})" if slower else "No prompt"
    return (
        f"{which} took more than {SLOWER:.0%} longer{unit} with `{ours}` than with "
        f"{'the best of ' if len(plain) > 1 else ''}{_named(plain)}; the worst is {worst}, at {ratio:.2f} of its "
        f"time, the median {ratios[len(ratios) // 2][1]:.2f}."
    )


def plot(path: Path, ratios: list[tuple[str, float]], ours: str, plain: str) -> None:
    from .bench_plots import COLOURS, axes_of, save

    figure, axes = axes_of(max(4.0, 1.5 + 0.14 * len(ratios)), 3.2)
    bars = axes.bar([prompt for prompt, _ in ratios], [ratio for _, ratio in ratios], color=COLOURS[2])
    for bar, (_, ratio) in zip(bars, ratios, strict=True):
        if ratio > 1 + SLOWER:
            bar.set_hatch("//")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(1 + SLOWER, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"time with {ours} / with {plain}")
    axes.set_xlabel("prompt")
    axes.tick_params(axis="x", rotation=90, labelsize=6)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a benchmark")
    parser.add_argument("--against", default="static", metavar="SYSTEM", help="default: %(default)s")
    parser.add_argument("--plain", default="threads", metavar="SYSTEM", help="default: %(default)s")
    parser.add_argument("--system", default="ours", metavar="SYSTEM", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not (args.folder / RESULTS).is_file():
        parser.error(f"{args.folder} holds no {RESULTS}")
    try:
        with results_of(args.folder / RESULTS):
            found = read(args.folder)
            if missing := [name for name in (args.against, args.system) if name not in found]:
                raise ValueError(f"no answers of {missing[0]}, there are {', '.join(found)}")
            lines = ablation(found, args.against)
    except (ValueError, IndexError) as error:
        parser.error(f"{args.folder}: {error}")
    picture = args.folder / "by_prompt.png"
    if args.plain in found and other_texts(found[args.system], found[args.plain]):
        lines += ["", f"`{args.system}` sampled other texts than `{args.plain}`: no prompt tells which is sooner done."]
        picture.unlink(missing_ok=True)
    elif args.plain in found:
        ratios = by_prompt(found, args.system, args.plain)
        lines += ["", sentence(ratios, args.system, args.plain)]
        plot(picture, ratios, args.system, args.plain)
    write_text(args.folder / "speculation.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
