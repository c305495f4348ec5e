"""What the benchmark compares: every way to have the same tuned model answer a prompt, timed alike.

All systems of one run share the prompt ids, the limit and how tokens are chosen, our own also the model's weights and
dtype; what another one runs on (`peers.py`) is said beside its figures. Time runs from the call to its return,
prefill included, and to the moment the first visible token could have been shown.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from medusa_apar.drafting.options import Speculation
from medusa_apar.events.recording import Recording
from medusa_apar.generate import MedusaApar
from medusa_apar.requests import Sampling

from .roofline import Counts, Shapes

LOOKUP_TOKENS = 10  # drafted by transformers' prompt lookup, its documentation's own choice
BACKEND = "inductor"  # of torch.compile, its default
# Fields of a generation config that change how tokens are sampled, and the values at which they do nothing.
OFF = {
    **{"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "guidance_scale": 1.0},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0},
    **{"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0},
}


@dataclass(slots=True)
class Answer:
    """One timed answer."""

    ids: list[int]  # visible tokens, a final end token included
    seconds: float
    first_token_seconds: float
    finish: str  # "stop", or "length" where the limit cut it
    steps: int | None = None  # forward passes of the model, the prompt's included; None where nobody counts them
    threads: int = 1
    peak_threads: int = 1
    peak_slots: int | None = None
    spans: list[list[int]] = field(default_factory=list)  # per thread: first and last step in which it got tokens
    rows: int | None = None  # of all forests, the prompt included
    drafted: dict[str, int] = field(default_factory=dict)  # nodes by who proposed them, and those that were right
    accepted: dict[str, int] = field(default_factory=dict)
    undrafted_steps: int = 0  # in which the heads were not asked, since they did not pay
    # Seconds in forward passes, and what these read and multiplied; None but for the compiled CPU runtime.
    forward_seconds: float | None = None
    read_bytes: int | None = None
    macs: int | None = None


class Clock:
    """A streamer that only looks at the clock when the first token comes."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # transformers shows a streamer the prompt first
            self._prompt = False
        elif self.first is None:
            self.first = time.perf_counter() - self.started

    def end(self) -> None: ...


@dataclass(slots=True)
class System:
    """A name on the command line, what it stands for, and how it answers."""

    name: str
    about: str
    apar: MedusaApar  # with the heads that it uses
    # Inputs of one prompt, most new tokens, how they are chosen.
    answer: Callable[[dict[str, torch.Tensor], int, Sampling], Answer]
    weights: str  # how they are stored: "float32", "Q4_1", and whose they are if not the tuned model's
    software: str = ""  # engine and version, where it is not ours
    close: Callable[[], None] = lambda: None  # after the last answer
    shapes: Shapes | None = None  # of a model that the compiled CPU runtime runs
    fork: bool | str = False  # where answers of ours split, as `generate` takes it


BASE, LISTS = "base", "lists"
OF_BASE = (BASE, LISTS)  # who answers with the untuned model
OTHERS = ("other-heads", "other-ours")  # who drafts with other heads
UNTUNED = "untuned base"  # in the weights of whoever answers with it
NAMES = {
    "hf": "transformers' generate, control tokens suppressed",
    "hf-pld": f"the same with prompt lookup of {LOOKUP_TOKENS} tokens",
    "hf-compiled": "the same, compiled: a static cache and torch.compile of every step but the prompt's",
    "base": "the untuned base model in our engine, without threads and heads",
    "lists": "the untuned base model in our engine, with threads at list items by rule",
    "ours-ar": "our engine without threads and heads",
    "threads": "our engine with threads",
    "heads": "our engine with heads",
    "ours": "our engine with threads and heads, and all else that it guesses ahead",
    "other-heads": "our engine with the heads of --other-heads",
    "other-ours": "ours, with the heads of --other-heads in place of its own",
    "ngrams": "our engine with threads that guess without heads, from what has been said",
    "ngrams+recycling": "the same, and by recycled tokens: what the model said last time behind the same tokens",
}
# Parts of `ours`, to see what each brings; all with threads and the same heads.
SPECULATIONS = {
    "static": Speculation.even(),
    "budget": Speculation(thread_weights=False, ngrams=False, forks=False),
    "budget+weighted": Speculation(ngrams=False, forks=False),
    "budget+forks": Speculation(thread_weights=False, ngrams=False),
    "budget+ngrams": Speculation(thread_weights=False, forks=False),
    "budget+recycling": Speculation(thread_weights=False, ngrams=False, forks=False, recycling=True),
    "ours+recycling": Speculation(recycling=True),
}
# Threads that guess without heads.
HEADLESS = {"ngrams": Speculation(), "ngrams+recycling": Speculation(recycling=True)}
NAMES |= {
    "static": "the same draft tree below every thread, as many nodes as pay",
    "budget": "one budget for the whole forest, of the heads' guesses alone",
    "budget+weighted": "the same, nodes of threads that the answer does not wait for earning half",
    "budget+forks": "the same, with [Child] below every drafted [Fork]",
    "budget+ngrams": "the same, with what has been said as guesses besides",
    "budget+recycling": "the same, with recycled tokens as guesses besides",
    "ours+recycling": "ours, with recycled tokens as guesses besides",
}


def make(
    name: str,
    apar: MedusaApar,
    longest: int = 0,
    untuned: MedusaApar | None = None,
    other: MedusaApar | None = None,
) -> System:
    """A system on the model, heads and control tokens of `apar`; ValueError for one that these cannot be.

    `longest`: most tokens of a prompt and its answer, for systems that set memory aside before they are asked.
    `untuned`: the base model without the tuning of `apar`'s, which `base` and `lists` answer with.
    `other`: the same model with other heads, which `OTHERS` draft with.
    """
    if name not in NAMES:
        raise ValueError(f"system {name!r} is none of {', '.join(NAMES)}")
    if name in OTHERS and other is None:
        raise ValueError(f"{name} needs --other-heads")
    parts = name in SPECULATIONS
    headless = name in HEADLESS
    threads = parts or headless or name in ("threads", "ours", "other-ours")
    heads = parts or name in ("heads", "ours", *OTHERS)
    if threads and apar.control_token_ids is None:
        raise ValueError(f"{name} needs a model that forks, and this one has no control tokens")
    if name in OF_BASE and untuned is None:
        raise ValueError(f"{name} needs the base model that this one was tuned from")
    whose = apar
    if untuned is not None and name in OF_BASE:
        whose = untuned
    elif other is not None and name in OTHERS:
        whose = other
    if heads and whose.heads is None:
        raise ValueError(f"{name} needs draft heads, and this model has none")
    weights = str(apar.model.dtype).removeprefix("torch.")
    if name.startswith("hf"):
        model, more = _compiled(apar.model, longest) if name == "hf-compiled" else (apar.model, {})
        if name == "hf-pld":
            more = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        software = f"transformers {transformers.__version__}"
        return System(name, NAMES[name], apar, partial(_transformers, apar, model, more), weights, software)
    ours = whose if heads else whose.without_heads()
    if parts:
        ours = ours.speculating(SPECULATIONS[name])
    elif headless:
        ours = ours.speculating(HEADLESS[name])
    facts = ours.runtime.facts
    shapes = Shapes.of(ours.model, facts.kind) if facts.backend == "cpu" else None
    weights = f"{facts.kind}, {UNTUNED}" if name in OF_BASE else facts.kind
    fork: bool | str = LISTS if name == LISTS else threads
    return System(name, NAMES[name], ours, partial(_ours, ours, fork, shapes), weights, shapes=shapes, fork=fork)


def seeded(sampling: Sampling, prompt: str, repeat: int) -> Sampling:
    """The same with a seed of its own for each repeat of a prompt, equal for all systems: 31 bits, which every engine
    takes. Greedy decoding has none."""
    if not sampling.temperature:
        return sampling
    digest = hashlib.sha256(f"{prompt}\n{repeat}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:4], "big") >> 1)


def chosen_by(sampling: Sampling, config: GenerationConfig) -> dict[str, Any]:
    """How tokens are chosen, as `generate` takes it: greedily as the model's own config has it, or by temperature and
    top-p and nothing else, since other engines know nothing of that config. `check.check_sampled` refuses what no value
    turns off."""
    if not sampling.temperature:
        return {"do_sample": False}
    own = {name: off for name, off in OFF.items() if getattr(config, name, None) not in (None, off)}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, **own}


def _ours(
    apar: MedusaApar,
    fork: bool | str,
    shapes: Shapes | None,
    inputs: dict[str, torch.Tensor],
    limit: int,
    sampling: Sampling,
) -> Answer:
    options: dict[str, Any] = {
        "max_new_tokens": limit,
        "fork": fork,
        **chosen_by(sampling, apar.model.generation_config),
    }
    if sampling.seed is not None:
        options["seed"] = sampling.seed
    clock = Clock()
    output = apar.generate(**{**inputs, **options}, streamer=clock, return_dict_in_generate=True)
    seconds = time.perf_counter() - clock.started
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    tree, stats = output.paragraph_tree[0], output.stats
    answer = Answer(
        ids=ids,
        seconds=seconds,
        first_token_seconds=seconds if clock.first is None else clock.first,
        finish="stop" if ids and ids[-1] in tree.eos_ids else "length",
        steps=stats.steps,
        threads=len(tree.threads),
        peak_threads=stats.peak_threads,
        peak_slots=stats.peak_slots,
        spans=_spans(output.recording),
        rows=stats.forward_tokens,
        drafted=dict(stats.drafted),
        accepted=dict(stats.accepted),
        undrafted_steps=stats.undrafted_steps,
    )
    if shapes is not None:
        counts = Counts.of(output.recording)
        answer.forward_seconds = stats.phase_seconds["forward"]
        answer.read_bytes, answer.macs = shapes.read_bytes(counts), shapes.macs(counts)
    return answer


def _spans(recording: Recording) -> list[list[int]]:
    """The first and the last step in which each thread of the first row got tokens; [] for none."""
    steps = [[origin.step for origin in recording.origins[thread]] for thread in recording.trees[0].threads]
    return [[min(own), max(own)] if own else [] for own in steps]


def _compiled(model: PreTrainedModel, longest: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model that shares all weights with `model`, and the options with which its `generate` compiles itself.

    The prompt's step is not compiled, so prompts of other lengths compile nothing anew; nor do longer answers, since
    the cache has one size from the warm-up on.
    """
    if BACKEND == "inductor" and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise ValueError(f"hf-compiled needs a C++ compiler, and there is no {compiler}: name yours in CXX")
    compiling: Any = CompileConfig(backend=BACKEND)
    compiling._compile_all_devices = True  # else generate compiles on accelerators only; there is no public name for it
    options = {"cache_implementation": "static", "max_cache_len": longest, "compile_config": compiling}
    return copy(model), options  # generate keeps the compiled step and the cache's size as attributes


def _transformers(
    apar: MedusaApar,
    model: Any,
    more: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    limit: int,
    sampling: Sampling,
) -> Answer:
    options: dict[str, Any] = {"max_new_tokens": limit, **chosen_by(sampling, model.generation_config), **more}
    if control := apar.control_token_ids:
        options["suppress_tokens"] = [control.fork_id, control.child_id]
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    clock = Clock()
    sequences = model.generate(**inputs, **options, streamer=clock)
    seconds = time.perf_counter() - clock.started
    ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    eos = model.generation_config.eos_token_id
    ended = bool(ids) and ids[-1] in (eos if isinstance(eos, list) else [eos])
    return Answer(
        ids=ids,
        seconds=seconds,
        first_token_seconds=seconds if clock.first is None else clock.first,
        finish="stop" if ended else "length",
        steps=None if "prompt_lookup_num_tokens" in more else len(ids),
    )
