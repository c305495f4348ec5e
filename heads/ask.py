"""Have the tuned model answer prompts with our own engine:  python -m medusa_apar.heads.ask --model NAME --out FILE ...

What `train.py` learns from: one JSON line per prompt, {"id", "prompt_ids", "threads": [{"parent", "fork_index",
"token_ids"}...]}, a child's token_ids beginning with its forced `[Child]`. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from medusa_apar.chat import encode_messages
from medusa_apar.finetune.corpus import Example, read_examples
from medusa_apar.finetune.packing import Tokens, tokenize_example
from medusa_apar.generate import MedusaApar
from medusa_apar.loading import load
from medusa_apar.paragraph_tree import ParagraphTree

Prompt = tuple[str, dict[str, torch.Tensor]]  # id, encoded

MAX_PROMPT = 200  # tokens: longer ones mostly bring text to work on
MAX_COPIED = 600  # tokens of a prompt and its copied answer


def shuffled_examples(paths: list[Path], seed: int) -> list[Example]:
    examples = list(read_examples(paths))
    random.Random(seed).shuffle(examples)
    return examples


def read_prompts(apar: MedusaApar, examples: list[Example]) -> Iterator[Prompt]:
    for example in examples:
        inputs = encode_messages(apar.tokenizer, example.messages)
        if inputs["input_ids"].shape[1] <= MAX_PROMPT:
            yield example.id, inputs


def copied_records(apar: MedusaApar, examples: list[Example]) -> Iterator[dict]:
    """Records of the corpora's own answers, cut into threads by rule: no generation, but not the model's words."""
    control, eos = apar.control_token_ids, apar.model.generation_config.eos_token_id
    assert control is not None
    for example in examples:
        threads, prompt = tokenize_example(example, apar.tokenizer, Tokens(control.fork_id, control.child_id, eos))
        if sum(len(ids) for ids, _, _ in threads) > MAX_COPIED:
            continue
        trunk = threads[0][0]
        records = [{"parent": -1, "fork_index": -1, "token_ids": trunk[prompt:]}]
        for ids, parent, at in threads[1:]:
            records.append({"parent": parent, "fork_index": at - (prompt if parent == 0 else 0), "token_ids": ids})
        yield {"id": example.id, "prompt_ids": trunk[:prompt], "threads": records}


def as_record(name: str, tree: ParagraphTree) -> dict:
    threads = []
    for thread in tree.threads:
        parent = thread.parent
        # Within a file a trunk's tokens are counted behind the prompt, a child's from its [Child].
        shift = parent.num_forced if parent is tree.trunk else 0
        threads.append(
            {
                "parent": -1 if parent is None else parent.index,
                "fork_index": thread.fork_index - shift,
                "token_ids": thread.token_ids if parent is None else thread.tokens,
            }
        )
    return {"id": name, "prompt_ids": tree.trunk.tokens[: tree.trunk.num_forced], "threads": threads}


def answer(
    apar: MedusaApar, names: list[str], prompts: list[dict[str, torch.Tensor]], max_new_tokens: int
) -> list[dict]:
    """Records of one batch, greedily answered."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def padded(key: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(p[key], (longest - p[key].shape[1], 0)) for p in prompts])

    output = apar.generate(
        input_ids=padded("input_ids"),
        attention_mask=padded("attention_mask"),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return [as_record(name, tree) for name, tree in zip(names, output.paragraph_tree, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or directory, as medusa_apar.load takes it")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="chat JSONL files, .gz or not")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    parser.add_argument(
        "--copy", action="store_true", help="take the corpora's own answers: quicker, less like the model's"
    )
    parser.add_argument("--count", type=int, default=500, help="prompts to answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--max-minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the prompts")
    parser.add_argument(
        "--shard", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th prompt from I"
    )
    args = parser.parse_args()
    apar = load(args.model, heads=None)
    examples = shuffled_examples(args.prompts, args.seed)
    if args.copy:
        with args.out.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(r) + "\n" for r in itertools.islice(copied_records(apar, examples), args.count))
        return
    ask(apar, examples, args)


def ask(apar: MedusaApar, examples: list[Example], args: argparse.Namespace) -> None:
    """Answers batch by batch until the count or the time is reached."""
    started = time.monotonic()
    done = set()
    if args.out.exists():
        done = {json.loads(line)["id"] for line in args.out.read_text().splitlines()}
    prompts = list(read_prompts(apar, examples))[args.shard[0] :: args.shard[1]][: args.count]
    todo = [(name, prompt) for name, prompt in prompts if name not in done]
    tokens = 0
    with args.out.open("a", encoding="utf-8") as out:
        for first in range(0, len(todo), args.batch):
            if time.monotonic() - started > 60 * args.max_minutes:
                break
            names, inputs = zip(*todo[first : first + args.batch], strict=True)
            for record in answer(apar, list(names), list(inputs), args.max_new_tokens):
                out.write(json.dumps(record) + "\n")
                done.add(record["id"])
                tokens += sum(len(thread["token_ids"]) for thread in record["threads"])
            out.flush()
            rate = tokens / (time.monotonic() - started)
            print(f"{len(done)}/{len(prompts)} prompts, {tokens} tokens, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
