"""What benchmarks read and write: prompts as lines of JSON, the plan of a run, an answer's row."""

import json

from medusa_apar.eval.plan import Plan


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row(system, prompt, seconds=1.0, tokens=10, repeat=0, looping=0.0, category="", steps=5):
    return {
        "system": system, "prompt": prompt, "repeat": repeat, "seconds": seconds, "tokens": tokens, "looping": looping,
        "category": category, "steps": steps, "peak_slots": 7, "repeated_4grams": 0.1, "first_token_seconds": 0.1,
        "threads": 2, "finish": "stop",
    }  # fmt: skip


PLAN = Plan("m", "w", "", "float32", "torch, float32", "cpu", 1, "p", 8)
