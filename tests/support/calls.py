"""Generate calls of all kinds, of which events and pictures have to tell the truth."""

import torch

import medusa_apar
from medusa_apar.triton_kernels import reference
from tests.support.drafters import RecallHeads
from tests.support.list_writer import list_prompts, list_writer
from tests.support.models import CONTROL, forking_model
from tests.support.prompts import prompts
from tests.support.tokenizers import ListTokenizer

SAMPLED = {"do_sample": True, "seed": 3, "top_k": 0}


def fork_freely(**options):
    """By control tokens, with guesses that are often right, so that several tokens, forks and children come at once."""
    generate = {"max_new_tokens": 40, "do_sample": False} | options.pop("generate", {})
    model = forking_model(options.pop("seed", 5))
    inputs = prompts(options.pop("rows", 2), 6, seed=3, ragged=True)
    plain = medusa_apar.attach(model, None, CONTROL).generate(
        **inputs, max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    heads = RecallHeads(model, plain.paragraph_tree)
    in_one_launch = options.pop("in_one_launch", False)
    apar = medusa_apar.attach(model, heads, CONTROL, **{"speculation": "forest", "budget": 40} | options)
    if in_one_launch:
        apar.runtime.verify = reference.verify
    return apar.generate(**inputs, return_dict_in_generate=True, **generate)


def fork_lists(**options):
    """By rule: tokens are inserted, children take over."""
    apar = medusa_apar.attach(list_writer(), tokenizer=ListTokenizer(), speculation="forest", **options)
    return apar.generate(**list_prompts(3), max_new_tokens=64, fork="lists", return_dict_in_generate=True, **SAMPLED)


def nineteen(input_ids, scores, **options):
    """Stops at nineteen tokens of prompt and text."""
    return torch.full((len(input_ids),), input_ids.shape[1] >= 19)


CALLS = {
    "control tokens": fork_freely,
    "a forest": lambda: fork_freely(seed=24),
    "the same tree for all": lambda: fork_freely(speculation="even"),
    "few threads at once": lambda: fork_freely(max_threads=2),
    # All three seem to fit; threads, and then a request, have to give their slots back.
    "under memory pressure": lambda: fork_freely(rows=3, seed=11, budget=3, pool_slots=141),
    "one after the other": lambda: fork_freely(rows=3, seed=11, pool_slots=92),
    "verified in one launch": lambda: fork_freely(in_one_launch=True),
    "cut short": lambda: fork_freely(generate={"max_new_tokens": 9}),
    "lists": fork_lists,
    "sampled": lambda: fork_freely(generate=SAMPLED),
    "typical acceptance": lambda: fork_freely(acceptance="typical", generate=SAMPLED),
    "stopped by a criterion": lambda: fork_freely(generate={"stopping_criteria": [nineteen]}),
    "a single token": lambda: fork_freely(generate={"max_new_tokens": 1}),
}
