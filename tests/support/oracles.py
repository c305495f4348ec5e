"""What is right: transformers' own decoding along a thread's path, and the model's own choice behind it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH
from medusa_apar.triton_kernels.reference import sample
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support.models import CONTROL


def plain_continuation(model, path_ids: list[int], length: int, prompt_length: int, **kwargs) -> list[int]:
    """What transformers' own greedy decoding writes behind a path under the fork rule."""
    rule = ControlTokensLogitsProcessor(CONTROL, prompt_length, kwargs.pop("fork", True), DEFAULT_MAX_DEPTH)
    path = torch.tensor([path_ids])
    out = model.generate(
        input_ids=path,
        attention_mask=torch.ones_like(path),
        max_new_tokens=length,
        do_sample=False,
        logits_processor=LogitsProcessorList([rule]),
        **kwargs,
    )
    return out[0, len(path_ids) :].tolist()


_continued: WeakKeyDictionary[PreTrainedModel, dict[tuple, list[int]]] = WeakKeyDictionary()


def known_continuation(model, path_ids: list[int], length: int, prompt_length: int) -> list[int]:
    """`plain_continuation`, decoded once for the same weights and path: many runs of a model have the same threads.

    Not for models whose weights are changed through `.data`, which torch does not count as a change.
    """
    weights = tuple((parameter.data_ptr(), parameter._version) for parameter in model.parameters())
    known = _continued.setdefault(model, {})
    key = weights, model.generation_config.to_json_string(), prompt_length, *path_ids
    if len(known.get(key, ())) < length:
        known[key] = plain_continuation(model, path_ids, length, prompt_length)
    return known[key][:length]


def assert_threads_are_plain(model, paragraph_trees) -> int:
    """Promise 1, thread by thread; returns how many threads were compared."""
    compared = 0
    for tree in paragraph_trees:
        for thread in tree.threads:
            if thread.token_ids:
                expected = known_continuation(model, thread.path_ids, len(thread.token_ids), tree.trunk.num_forced)
                assert thread.token_ids == expected, thread
                compared += 1
    return compared


def assert_chosen_tokens_are_the_models(model, trees, seed=None, process=lambda ids, scores: scores) -> int:
    """Promises 1 and 2: behind its path, insertions included, every token a thread chose is what the model chooses."""
    compared = 0
    for tree in trees:
        for thread in tree.threads:
            path, first = thread.path_ids + thread.token_ids, len(thread.path_ids)
            with torch.no_grad():
                logits = model(torch.tensor([path])).logits[0].float()
            for place in range(first, len(path)):
                index = place - first + thread.num_forced
                if index in thread.inserted:
                    continue
                scores = process(torch.tensor([path[:place]]), logits[place - 1][None])[0]
                if seed is None:
                    chosen = int(scores.argmax())
                else:
                    chosen = sample(scores, seed, thread.key, thread.start + index)
                assert chosen == path[place], (thread, index)
                compared += 1
    return compared
