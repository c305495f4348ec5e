"""Whether every thread's tokens are what the model itself would have written, on this machine and in this dtype.

Each thread is read once more in one plain forward pass over its path, by transformers alone: at every place the model's
likeliest token by the fork rule must be the one that was written. Where it is another, the two were as good as equal in
low precision (a tie: within `TIE` of the scores' spread), or something is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medusa_apar.chat import encode
from medusa_apar.eval.prompts import Prompt
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job
from medusa_apar.paragraph_tree import ParagraphTree

# Two scores this near, as a share of the largest score, are one score in that precision: a few units of its last place,
# gathered over the layers.
TIE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def check(job: Job, apar: MedusaApar, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, Any]:
    """Answers the prompts once more and checks each thread; the result goes into the log and is returned."""
    found: dict[str, Any] = {"threads": 0, "tokens": 0, "ties": [], "wrong": []}
    with job.bar("checking", len(prompts)) as bar:
        for prompt in prompts:
            inputs = {
                name: tensor.to(apar.model.device) for name, tensor in encode(apar.tokenizer, prompt.text).items()
            }
            output: Any = apar.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
            )
            for place, distance in differences(apar, output.paragraph_tree[0], found):
                kind = "ties" if distance <= TIE[apar.model.dtype] else "wrong"
                found[kind].append({"prompt": prompt.id, **place, "distance": distance})
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
        scores = apar.model(input_ids=path, use_cache=False).logits[0, first:-1].float()
        largest = scores.abs().amax(-1)
        if control is not None:
            scores[:, control.child_id] = -torch.inf
            before = path[0, first:-1]
            banned = (before == control.fork_id) | (before == control.child_id)
            if thread.depth >= apar.max_depth:
                banned = torch.ones_like(banned)
            scores[banned, control.fork_id] = -torch.inf
        chosen = scores.argmax(-1)
        actual = torch.tensor(written, device=chosen.device)
        counts["threads"] += 1
        counts["tokens"] += len(written)
        for place in (chosen != actual).nonzero()[:, 0].tolist():
            gap = scores[place, chosen[place]] - scores[place, actual[place]]
            found.append(({"thread": thread.index, "place": place}, float(gap / largest[place])))
    return found


def sentence(found: dict[str, Any]) -> str:
    text = f"{found['tokens']} tokens of {found['threads']} threads are what the model itself chooses"
    if found["ties"]:
        text += f", but for {len(found['ties'])} ties that fell the other way"
    if found["wrong"]:
        first = found["wrong"][0]
        text += (
            f"; {len(found['wrong'])} ARE NOT, the first in prompt {first['prompt']}, thread {first['thread']}, token "
            f"{first['place']}"
        )
    return text + "."
