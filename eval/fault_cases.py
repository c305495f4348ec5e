"""Questions of the fault campaign whose right answers are known, and bodies that no server may answer."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_apar.generate import MedusaApar
from medusa_apar.models.chat import encode
from medusa_apar.requests import Sampling
from medusa_apar.threads.paragraph_tree import thread_key

from .prompts import Prompt

MOST_TOKENS = 24  # of an answer: short ones make more faults a minute
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass(slots=True)
class Case:
    """A question.

    ids, texts, reasons: of its choices, as an engine gives them that answers nothing else.
    """

    path: str
    body: dict[str, Any]
    prompt_ids: list[int]
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)


def cases_of(apar: MedusaApar, prompts: list[Prompt], number: int, rng: random.Random) -> list[Case]:
    """Greedy and seeded ones, chats and bare tokens, forking and not, all of which an engine alone has answered."""
    tokenizer: Any = apar.tokenizer
    control = () if apar.control_token_ids is None else apar.control_token_ids.ids
    special = {*tokenizer.all_special_ids, *control}
    usual = [token for token in range(min(len(tokenizer), apar.model.config.vocab_size)) if token not in special]
    return [_case(apar, rng, usual, rng.choice(prompts).text[:80]) for _ in range(number)]


def _case(apar: MedusaApar, rng: random.Random, usual: list[int], text: str) -> Case:
    limit = rng.randint(1, MOST_TOKENS)
    body: dict[str, Any] = {"max_tokens": limit, "temperature": 0, "return_token_ids": True}
    if rng.random() < 0.5:
        body |= {
            "temperature": rng.choice([0.7, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.9]),
            "seed": rng.getrandbits(31),
        }
    fork = rng.random() < 0.7
    if not fork:
        body["apar"] = {"fork": False}
    if rng.random() < 0.5:
        path, ids = CHAT, encode(apar.tokenizer, text)["input_ids"][0].tolist()
        body["messages"] = [{"role": "user", "content": text}]
    else:
        path, ids = COMPLETION, rng.choices(usual, k=rng.randint(1, 40))
        body["prompt"] = ids
    odd = rng.random()
    if odd < 0.2:
        body["stop"] = [rng.choice("etaoin"), "never to be found"]
    elif odd < 0.3:
        body["n"] = rng.randint(2, 3)
    case = Case(path, body, ids)
    for choice in range(body.get("n", 1)):
        found, reason = _alone(apar, case, "auto" if fork else "off", choice)
        found, answer, stopped = _cut(apar, found, body.get("stop", ()))
        case.ids.append(found)
        case.texts.append(answer)
        case.reasons.append("stop" if stopped else reason)
    return case


def _alone(apar: MedusaApar, case: Case, fork: str, choice: int) -> tuple[list[int], str | None]:
    """What an engine of its own answers, with nobody beside it and without stop strings; why that ended.

    The first choice has the request's seed, the others each their own, drawn from it by their number.
    """
    body, seed = case.body, case.body.get("seed")
    if seed is not None and choice:
        seed = thread_key(seed, choice) >> 1
    sampling = Sampling(body["temperature"], top_p=body.get("top_p", 1.0), seed=seed)
    request = apar.request("alone", case.prompt_ids, max_new_tokens=body["max_tokens"], sampling=sampling, fork=fork)
    with apar.engine() as engine:
        engine.add(request)
        while engine.unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
    return list(request.text_ids), request.finish_reason


def _cut(apar: MedusaApar, ids: list[int], stops: Sequence[str]) -> tuple[list[int], str, bool]:
    """The tokens up to the one that completes a stop string, the text before that, and whether there is one."""
    tokenizer: Any = apar.tokenizer

    def text_of(count: int) -> str:
        text: str = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    for count in range(1, len(ids) + 1):
        text = text_of(count)
        ends = [(place + len(stop), -len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
        if ends:
            end, length = min(ends)
            return ids[:count], text[: end + length], True
    return ids, text_of(len(ids)), False


# Values that their fields cannot have, on either route.
_BAD: dict[str, list[Any]] = {
    "temperature": [-1, 2.5, "hot", [], {}],
    "top_p": [0, -0.5, 1.5, "x"],
    "max_tokens": [-1, "many", 1.5, 2**70, [3]],
    "n": [0, -2, 10**9, "two"],
    "seed": ["x", 0.5, 2**80],
    "stop": [5, [5], [""], {"a": "b"}, ["x"] * 1000],
    "logit_bias": [{"-1": 1}, {"x": 1}, {"1": 1000}, {str(2**40): 1}, [1], "x"],
    "stream": ["yes", 1, []],
    "stream_options": ["x", {"include_usage": "x"}, {"never_heard_of": True}],
    "model": ["a model that is not here", 5],
    "apar": [{"fork": "maybe"}, {"max_threads": 0}, {"never_heard_of": 1}, 5],
    "response_format": [{"type": "xml"}, "json"],
    "presence_penalty": [3, "x"],
    "never_heard_of": [1],
    "stop_token_ids": [[-1], [2**31], ["x"], 5],
    "min_tokens": [-1, "x"],
}
_BAD_ROUTE: dict[str, dict[str, list[Any]]] = {
    CHAT: {"messages": [[], "hello", [{"role": "king", "content": "x"}], [{"role": "user"}], [5], None]},
    COMPLETION: {"prompt": [[], [[]], [-1], [2**40], [0.5], {"a": 1}, None, [True]]},
}
_NO_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"a":' * 20000,
    b"[" * 100000,
    b"[" * 5000,
    b'{"n": NaN}',
    b"0" * 50,
]


def malformed(case: Case, rng: random.Random) -> bytes:
    """A body that has to be refused."""
    if rng.random() < 0.25:
        return rng.choice(_NO_JSON)
    bad = _BAD | _BAD_ROUTE[case.path]
    name = rng.choice(sorted(bad))
    body = dict(case.body) | {name: rng.choice(bad[name])}
    return json.dumps(body).encode()
