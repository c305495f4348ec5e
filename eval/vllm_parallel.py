"""Threads on a vLLM that divides a model or its answers:  python -m medusa_apar.eval.vllm_parallel --out DIR/FILE.json

Tensor parallelism by 2 over a random Llama of 8 heads, made on the spot, as SmolLM2's 9 do not divide; data parallelism
by 2 over SmolLM2. Every answer must be our own engine's, token for token, in float32: else the exit code is 1.
`make vllm-parallel` makes the environment that it needs, and sets what vLLM reads from there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medusa_apar.arguments import number
from medusa_apar.job import machine, quiet, write_text

from . import prompts
from .vllm_answers import Answer, asked_again, native, opened

MODEL = "smollm2-135m"
RANKS = 2
# With a worker a core, threads of each would only wait for each other, and binding them wants a NUMA node a worker.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def random_llama(like: Path, folder: Path) -> Path:
    """A model of random weights that forks and ends now and then, with the tokenizer and control tokens of another.

    A row of the unembedding that is longer than others wins more often, and more often loses by far.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from medusa_apar.threads.control_tokens import CONFIG_NAME, ControlTokens

    tokenizer, control = AutoTokenizer.from_pretrained(like), ControlTokens.from_pretrained(like)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[control.fork_id] *= 2.5
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / CONFIG_NAME, json.dumps(control.as_config()) + "\n")
    return folder


async def measured(model: Path, answers: Sequence[Answer], **args: Any) -> dict[str, Any]:
    """How many of the answers vLLM gives too, all asked at once, and what it took."""
    began = time.perf_counter()
    engine = await opened(model, **args)
    ready = time.perf_counter()
    try:
        texts = await asked_again(engine, answers)
        seconds, stats = time.perf_counter() - ready, engine.stats()
    finally:
        await engine.close()
    equal = sum(text == answer.text_ids for text, answer in zip(texts, answers, strict=True))
    return {
        "args": args,
        "answers": len(answers),
        "equal": equal,
        "tokens": sum(len(answer.text_ids) for answer in answers),
        "forks": sum(answer.forks for answer in answers),
        "steps": stats.steps,
        "peak_threads": stats.peak_threads,
        "seconds_to_start": round(ready - began, 1),
        "seconds_to_answer": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.vllm_parallel", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--prompts", default=prompts.DEFAULT, help="a set of `bench`, or a file (default: %(default)s)")
    add("--limit", type=number(int, 1), default=4, help="questions (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), default=64, help="of an answer (default: %(default)s)")
    add("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args(arguments)
    quiet()
    os.environ |= VARIABLES
    from medusa_apar.engine.vllm.compat import check_version
    from medusa_apar.models.merge import plain_folder
    from medusa_apar.models.sources import locate

    questions = [(prompt.text, "auto") for prompt in prompts.read(args.prompts, args.limit)]
    merged = plain_folder(locate(MODEL), torch.float32)
    assert merged is not None  # it is an adapter
    with tempfile.TemporaryDirectory() as scratch:
        models = {"tensor": random_llama(merged, Path(scratch) / "random"), "data": merged}
        answers = {kind: native(model, questions, args.max_new_tokens) for kind, model in models.items()}
        found = {
            kind: asyncio.run(measured(model, answers[kind], **{f"{kind}_parallel_size": RANKS}))
            for kind, model in models.items()
        }
    about = machine()
    about["versions"]["vllm"] = check_version()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    told = json.dumps({**about, "variables": VARIABLES, "options": options, "found": found}, indent=1)
    print(told)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, told + "\n")
    return 0 if all(its["equal"] == its["answers"] for its in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
