"""What benchmarks read and write: prompts as lines of JSON, the plan of a run, an answer's row. And the command itself,
on a tiny model."""

import json
from types import SimpleNamespace

from transformers import AutoModelForCausalLM

from medusa_apar.commands.cli import main
from medusa_apar.eval.plan import Plan
from medusa_apar.heads import MedusaHeads
from tests.support.folders import forking_folder


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


def asked_folder(root):
    """A tiny model that forks, with heads beside it, and what it is asked."""
    forking_folder(root / "model")
    loaded = AutoModelForCausalLM.from_pretrained(root / "model")
    MedusaHeads.random(loaded, num_heads=2).save_pretrained(root / "heads")
    asked = lines(
        root / "p.jsonl", *({"id": n, "category": "xy"[n % 2], "prompt": "ask " + "abc"[n]} for n in range(3))
    )
    return SimpleNamespace(root=root, model=str(root / "model"), heads=str(root / "heads"), prompts=asked)


def command(folder, out, *more):
    model = ["--model", folder.model, "--heads", folder.heads, "--prompts", folder.prompts, "--max-new-tokens", "20"]
    return main(["bench", *model, "--out", str(out), *map(str, more)])


def read_rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
