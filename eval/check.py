"""Whether every thread's tokens are what the model itself would have written, on this machine and in this dtype.

The timed answers are made once more and must be the same. Then each thread is read in one plain forward pass over its
path, by transformers alone: at every place the model's likeliest token by the fork rule must be the one that was
written. Where it is another, the two were as good as equal in low precision (a tie: their scores differ by less than
`TIE` of the largest), or something is wrong.

Transformers has no model of our quantised weights, and rounds activations too in low precision, where the CPU runtime
does not. Answers from these are held against the same weights in that runtime, each thread's path alone in one pass:
no other threads, no drafts, and not one tie allowed. It shows that speculation does not show, not that the weights are
good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.models.chat import encode
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import ParagraphTree
from medusa_apar.verify.control_processor import ban_control_tokens

from .prompts import Prompt
from .runs import Runs
from .systems import OFF, System

# Share of the largest score: some three units of a dtype's last place; in float32, what sums in another order lose.
TIE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What makes greedy decoding choose otherwise than by the model's own scores.
PROCESSORS = (
    *("no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"),
    "exponential_decay_length_penalty",
)


def check_greedy(apar: MedusaApar) -> None:
    """ValueError where the model's generation config has processors, which the check does not know."""
    config: Any = apar.model.generation_config
    found = [name for name in PROCESSORS if getattr(config, name, None)]
    if (config.repetition_penalty or 1.0) != 1.0:
        found.append("repetition_penalty")
    if found:
        raise ValueError(f"the model's generation config sets {found[0]}, and --check knows plain greedy decoding only")


def check_sampled(apar: MedusaApar) -> None:
    """ValueError where the model's generation config has what no value turns off, as `chosen_by` does all else."""
    config: Any = apar.model.generation_config
    for name in (*PROCESSORS, "top_h", "watermarking_config"):
        if name not in OFF and getattr(config, name, None) not in (None, [], {}):
            raise ValueError(
                f"the model's generation config sets {name}, and sampled answers are chosen by temperature and top-p "
                "alone: remove it there"
            )


def check(job: Job, system: System, results: Runs, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
    """Checks the system's answers in `results`; what was found goes into the log and is returned."""
    apar = system.apar
    by_itself = checks_itself(apar)
    found: dict[str, Any] = {
        "system": system.name,
        "by_itself": by_itself,
        "threads": 0,
        "tokens": 0,
        "ties": [],
        "wrong": [],
    }
    with job.bar("checking", len(prompts)) as bar:
        for prompt in prompts:
            inputs = encode(apar.tokenizer, prompt.text)
            inputs = {name: tensor.to(apar.model.device) for name, tensor in inputs.items()}
            output: Any = apar.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
            )
            ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            if ids != results.rows[system.name, prompt.id, 0]["ids"]:
                found["wrong"].append({"prompt": prompt.id, "reason": "another answer than the timed one"})
            for place, distance in differences(apar, output.paragraph_tree[0], found):
                kind = "ties" if not by_itself and distance <= TIE[apar.model.dtype] else "wrong"
                reason = f"token {place['place']} of thread {place['thread']} is not the model's choice"
                found[kind].append({"prompt": prompt.id, "reason": reason, **place, "distance": distance})
            bar.advance(shown=f"{found['tokens']} tokens, {len(found['ties'])} ties, {len(found['wrong'])} wrong")
    job.log("check", **found)
    return found


@torch.no_grad()
def differences(apar: MedusaApar, tree: ParagraphTree, counts: dict[str, Any]) -> list[tuple[dict[str, int], float]]:
    """(thread and place, how much higher the model's choice scores, as a share of the largest score)."""
    control = apar.control_token_ids
    found = []
    for thread in tree.threads:
        written = thread.token_ids
        if not written:
            continue
        path = torch.tensor([thread.path_ids + written], device=apar.model.device)
        first = len(thread.path_ids) - 1
        if checks_itself(apar):
            scores = logits_alone(apar.runtime, path[0, :-1].tolist(), first)
        else:
            scores = apar.model(input_ids=path, use_cache=False).logits[0, first:-1].float()
        largest = scores.abs().amax(-1)
        if control is not None:
            last_ids = path[0, first:-1]
            depths = torch.full_like(last_ids, thread.depth)
            ban_control_tokens(ForkRule.of(control, apar.max_depth), scores, last_ids, depths)
        chosen = scores.argmax(-1)
        actual = torch.tensor(written, device=chosen.device)
        counts["threads"] += 1
        counts["tokens"] += len(written)
        for place in (chosen != actual).nonzero()[:, 0].tolist():
            gap = scores[place, chosen[place]] - scores[place, actual[place]]
            found.append(({"thread": thread.index, "place": place}, float(gap / largest[place])))
    return found


def checks_itself(apar: MedusaApar) -> bool:
    """Whether answers are held against the CPU runtime's own weights instead of transformers."""
    return apar.runtime.facts.backend == "cpu" and apar.runtime.facts.kind != "float32"


@torch.no_grad()
def logits_alone(runtime: Runtime, ids: list[int], first: int) -> torch.Tensor:
    """[len(ids) - first, vocab]: what the runtime says behind the places from `first` on, of one text by itself."""
    ledger = SlotLedger(KVPool())
    with runtime.session():
        forest = Forest([[Segment(ParagraphTree(ids).trunk, len(ids))]], ledger, torch.device("cpu"))
        forest.verified_rows = torch.arange(first, len(ids))
        return runtime.forward(forest, ledger.pool)[0]


def sentence(found: dict[str, Any]) -> str:
    whose = "the rounded weights choose for each thread alone" if found["by_itself"] else "the model itself chooses"
    text = f"{found['tokens']} tokens of {found['threads']} threads are what {whose}"
    if found["ties"]:
        text += f", but for {len(found['ties'])} ties that fell the other way"
    if found["wrong"]:
        first = found["wrong"][0]
        text += f"; {len(found['wrong'])} ARE NOT, the first in prompt {first['prompt']}: {first['reason']}"
    return text + "."
