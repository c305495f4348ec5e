"""What choosing tokens costs a step, by how they are chosen:  python -m medusa_apar.eval.sampling [--quantize int8]

One question is answered in each way, the ways in turns; a row is the turn with the cheapest verification. `verify` is
what a step spends from its logits to its accepted tokens, `step` all of it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine
from medusa_apar.loading import load
from medusa_apar.models.chat import encode

QUESTION = "What are the most effective ways to deal with stress?"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 0.7": {"temperature": 0.7, "top_k": 0},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9, "top_k": 0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "repetition 1.1": {"do_sample": False, "repetition_penalty": 1.1},
    "presence, frequency 0.3": {"do_sample": False, "presence_penalty": 0.3, "frequency_penalty": 0.3},
}


def measure(apar: MedusaApar, max_new_tokens: int, turns: int) -> dict[str, dict[str, float]]:
    """By way: ms of verification and of a whole step, rows a step, and steps."""
    inputs = encode(apar.tokenizer, QUESTION)
    found: dict[str, dict[str, float]] = {}
    for turn in range(turns + 1):  # the first warms up
        for way, options in WAYS.items():
            asked = {"do_sample": True, "seed": 1, "max_new_tokens": max_new_tokens} | options
            if not asked["do_sample"]:
                del asked["seed"]
            stats = apar.generate(**inputs, return_dict_in_generate=True, **asked).stats
            phases = stats.phase_seconds
            row = {
                "verify": 1e3 * phases["verify"] / stats.steps,
                "step": 1e3 * sum(phases.values()) / stats.steps,
                "rows": stats.forward_tokens / stats.steps,
                "steps": stats.steps,
            }
            if turn and (way not in found or row["verify"] < found[way]["verify"]):
                found[way] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser("medusa_apar.eval.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", choices=["int8"], help="weights and activations in 8 bits")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(machine()))
    print(f"{'':28} {'verify, ms':>10} {'step, ms':>9} {'rows':>5} {'steps':>6}")
    for way, row in measure(load(args.model, quantize=args.quantize), args.max_new_tokens, args.turns).items():
        print(f"{way:28} {row['verify']:10.2f} {row['step']:9.2f} {row['rows']:5.1f} {row['steps']:6.0f}")


if __name__ == "__main__":
    main()
