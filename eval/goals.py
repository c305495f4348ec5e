"""Figures of answers, and the table that puts them beside the goals for shipped weights."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from medusa_apar.finetune.corpus import repeated_share
from medusa_apar.finetune.rules import paragraph_tree

from .loops import LOOPS, looping_share
from .questions import CORPUS, PLAIN
from .runs import Runs

THREAD_LIMIT = 256  # tokens within which a thread should end
GOALS = {"threads": {"vicuna": "2.0", "mt": "1.4"}, "both": {"vicuna": "4.5", "mt": "3.0"}}  # tokens per step
HEADS_GOALS = {"medusa": "2.4", "hydra": "2.9"}  # accepted tokens per thread and step
TITLES = {
    "threads": "tokens per step, threads only",
    "single": "tokens per step, one thread",
    "both": "tokens per step, both",
    "heads": "accepted tokens per thread and step, heads only",
    "base": "tokens per step, untuned base",
}


def speed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per step and accepted tokens of some answers."""
    if not rows:
        return {"answers": 0}
    tokens, steps = [len(row["ids"]) for row in rows], [row["steps"] for row in rows]
    return {
        "answers": len(rows),
        "mean_tokens": fmean(tokens),
        "tokens_per_step": fmean(t / s for t, s in zip(tokens, steps, strict=True)),
        "tokens_per_step_pooled": sum(tokens) / sum(steps),
        "accepted_per_thread_step": sum(row["gained"] for row in rows) / sum(row["thread_steps"] for row in rows),
        "mean_forks": fmean(len(row["threads"]) - 1 for row in rows),
    }


def thread_ends(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How the children ended: by themselves within THREAD_LIMIT tokens, not, or cut before by the answer's limit.

    `share` leaves the cut ones out, `at_least` counts them as threads that would not have ended.
    """
    counts = {"stopped": 0, "too_long": 0, "cut": 0}
    for row in rows:
        for thread in row["threads"][1:]:
            if len(thread["token_ids"]) > THREAD_LIMIT:
                counts["too_long"] += 1
            else:
                counts["stopped" if thread["finish_reason"] == "stop" else "cut"] += 1
    known = counts["stopped"] + counts["too_long"]
    every = known + counts["cut"]
    return {
        **counts,
        "share": counts["stopped"] / known if known else None,
        "at_least": counts["stopped"] / every if every else None,
    }


def forks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the answers fork at least once."""
    forked = sum(len(row["threads"]) > 1 for row in rows)
    return {"prompts": len(rows), "forked": forked, "share": forked / len(rows) if rows else None}


def figures(runs: Runs, eos_ids: set[int]) -> dict[str, Any]:
    """All figures of what has been run so far; a figure that nothing was run for is missing."""
    by: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (system, name, _), row in runs.rows.items():
        by.setdefault(system, {}).setdefault(name, []).append(row)
        if "steps" in row:
            shown = [token for token in row["ids"] if token not in eos_ids]
            row["looping"], row["repeated"] = looping_share(shown), repeated_share(shown) if len(shown) >= 4 else None
    found: dict[str, Any] = {"speed": {}, "repeated_4grams": {}, "forks": {}, "loss": {}}
    for system, name, rows in ((system, *item) for system, sets in by.items() for item in sets.items()):
        if "steps" in rows[0]:
            calm = [row for row in rows if row["looping"] <= LOOPS]
            found["speed"].setdefault(system, {})[name] = {
                "all": speed(rows),
                "no_loops": speed(calm),
                "looping": [row["id"] for row in rows if row["looping"] > LOOPS],
                "drafted_by": rows[0].get("drafted_by"),
            }
            found["repeated_4grams"].setdefault(system, {})[name] = {
                part: fmean(shares) if (shares := [r["repeated"] for r in some if r["repeated"] is not None]) else None
                for part, some in (("all", rows), ("no_loops", calm))
            }
    threaded = by.get("threads", {})
    if threaded:
        found["thread_ends"] = {name: thread_ends(rows) for name, rows in threaded.items()}
        found["thread_ends"]["prompts"] = thread_ends(
            [r for name, rows in threaded.items() if name != CORPUS for r in rows]
        )
    asked = threaded.get(CORPUS, [])
    for kind in sorted({row["kind"] for row in asked}):
        found["forks"][kind] = forks([row for row in asked if row["kind"] == kind])
    if asked:
        found["forks"]["structured"] = forks([row for row in asked if not row["kind"].startswith(PLAIN)])
        found["forks"]["code_or_plain"] = forks([row for row in asked if row["kind"].startswith(PLAIN)])
        # The corpus's answer is one way to answer; whether a fork was in its place, the answer itself tells.
        could = [paragraph_tree(row["text"])[1] != PLAIN for row in asked]
        for name, wanted in (("own_answer_structured", True), ("own_answer_code_or_plain", False)):
            found["forks"][name] = forks([row for row, can in zip(asked, could, strict=True) if can == wanted])
    losses = {name: by.get(f"{name}_loss", {}).get(CORPUS, []) for name in ("tuned", "base")}
    both = set.intersection(*({row["id"] for row in rows} for rows in losses.values()))
    for name, rows in losses.items():
        rows = [row for row in rows if row["id"] in both]
        if rows:
            tokens = sum(row["tokens"] for row in rows)
            found["loss"][name] = {
                "dialogues": len(rows),
                "tokens": tokens,
                "per_token": sum(row["loss"] for row in rows) / tokens,
                "per_token_without_control": sum(row["loss_without_control"] for row in rows) / tokens,
            }
    if found["loss"]:
        found["loss"]["change"] = found["loss"]["tuned"]["per_token"] / found["loss"]["base"]["per_token"] - 1
    pairs = [
        (row["ids"], other["ids"])
        for (system, name, id), row in runs.rows.items()
        if system.startswith("both ") and "replayed" not in row and (other := runs.rows.get(("threads", name, id)))
    ]
    if pairs:  # in float32 all of them, or something is wrong; in bfloat16 ties fall differently
        found["both_equal_threads"] = sum(one == other for one, other in pairs) / len(pairs)
    return found


def table(found: dict[str, Any]) -> str:
    """The goals and what was reached, as Markdown."""
    lines = ["| measure | set | goal | reached | reached, no loops | n (looping) |", "|---|---|---|---|---|---|"]

    def line(measure: str, name: str, goal: str, reached: str, calm: str = "", count: object = "") -> None:
        lines.append(f"| {measure} | {name} | {goal} | {reached} | {calm} | {count} |")

    for system, sets in found["speed"].items():
        name_, _, kind = system.partition(" ")
        title = TITLES.get(name_, system) + (f", {kind}" if kind else "")
        by = str(next(iter(sets.values()))["drafted_by"] or "").split(", ")
        title += "".join(f", {part}" for part in by[1:])
        for name, figure in sets.items():
            key = "accepted_per_thread_step" if name_ == "heads" else "tokens_per_step"
            goal = HEADS_GOALS.get(kind, "") if name_ == "heads" else GOALS.get(name_, {}).get(name, "")
            shown = []
            for part in (figure["all"], figure["no_loops"]):
                text = f"{part[key]:.2f}" if part["answers"] else "-"
                if part["answers"] and name_ != "heads":
                    text += f" (pooled {part['tokens_per_step_pooled']:.2f})"
                shown.append(text)
            line(title, name, goal, shown[0], shown[1], f"{figure['all']['answers']} ({len(figure['looping'])})")
    for side, goal in (
        ("structured", "> 80 %"),
        ("code_or_plain", "< 10 %"),
        ("own_answer_structured", ""),
        ("own_answer_code_or_plain", ""),
    ):
        if side in found["forks"]:
            fork = found["forks"][side]
            measure = f"answers that fork, {side.replace('_', ' ')}"
            line(measure, CORPUS, goal, _percent(fork["share"]), count=fork["prompts"])
    for name, ends in found.get("thread_ends", {}).items():
        goal = "> 95 %" if name == "prompts" else ""
        n = f"{ends['stopped'] + ends['too_long']} (and {ends['cut']} cut, which only the least counts)"
        reached = f"{_percent(ends['share'])} (at least {_percent(ends['at_least'])})"
        line(f"threads that end within {THREAD_LIMIT} tokens", name, goal, reached, count=n)
    if found["loss"]:
        loss = found["loss"]
        change = f"{loss['change']:+.2%} ({loss['tuned']['per_token']:.4f} against {loss['base']['per_token']:.4f})"
        line("loss on plain dialogues", CORPUS, "+2 % at most", change, count=loss["base"]["dialogues"])
    repeated = found["repeated_4grams"]
    for name, tuned in repeated.get("threads", {}).items():
        base = repeated.get("base", {}).get(name)
        if base:
            pairs = [f"{_percent(tuned[p])} (base {_percent(base[p])})" for p in ("all", "no_loops")]
            line("repeated 4-grams", name, "no more than the base", pairs[0], pairs[1])
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
