"""Guides: masks against the texts that a schema allows, along any path and below any drafts."""

import json
import os
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar import Guide
from medusa_apar.verify.guides import GuideLogitsProcessor, compiled
from tests.support.models import EOS, VOCAB
from tests.support.tokenizers import ListTokenizer, json_tokenizer

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")

TEXTS = ['"ab"', '"abc"', '"true"', "12", "127", "true", '"a b"']
PROMPT = [7, 8, 9]
tokenizer = cache(json_tokenizer)


def grammar(schema=None, end_ids=(EOS,), **parts):
    guide = Guide() if schema is None else Guide.json_schema(schema)
    return compiled(guide, **{"tokenizer": tokenizer(), "vocabulary": VOCAB, "end_ids": end_ids} | parts)


def bits(mask, vocab=VOCAB):
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab].astype(bool).tolist()


def allowed_by_texts(written):
    """Whether some text goes on with each token, or is complete. Where the texts leave no choice for a while, the
    longest token of what they have in common is meant."""
    said = tokenizer().decode(written)
    rests = [text[len(said) :] for text in TEXTS if text.startswith(said)]
    pieces = [tokenizer().decode([token]) for token in range(VOCAB)]
    found = [token > 4 and any(rest.startswith(piece) for rest in rests) for token, piece in enumerate(pieces)]
    if common := os.path.commonprefix(rests):
        longest = max((piece for piece in pieces if common.startswith(piece)), key=len)
        found = [may and piece == longest for may, piece in zip(found, pieces, strict=True)]
    found[EOS] = "" in rests
    return found


@cache
def paths():
    """Every path of tokens along these texts, end tokens apart."""
    found, todo = [], [[]]
    while todo:
        path = todo.pop()
        found.append(path)
        todo += [[*path, token] for token, may in enumerate(allowed_by_texts(path)) if may and token != EOS]
    return found


def test_a_mask_is_what_goes_on_with_some_text():
    """Wherever the parser stood before: forwards, backwards, from one branch to another."""
    process = GuideLogitsProcessor(grammar({"enum": [json.loads(text) for text in TEXTS]}), len(PROMPT))
    order = np.random.default_rng(1).permutation(len(paths()))
    assert len(order) > 30
    for path in (paths()[place] for place in order):
        (mask,) = process.masks(PROMPT + path)
        assert bits(mask) == allowed_by_texts(path), tokenizer().decode(path)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_draft_nodes_stand_behind_their_own_path(data):
    process = GuideLogitsProcessor(grammar({"enum": [json.loads(text) for text in TEXTS]}), len(PROMPT))
    path = data.draw(st.sampled_from(paths()))
    tokens, parents, behind = [], [], [path]
    for node in range(data.draw(st.integers(0, 8))):
        parent = data.draw(st.integers(-1, node - 1))
        above = behind[1 + parent]
        likely = [token for token, may in enumerate(allowed_by_texts(above or [])) if may]
        token = data.draw(st.sampled_from([*likely, 11, VOCAB, -1]))
        goes_on = above is not None and token != EOS and token in likely
        tokens.append(token)
        parents.append(parent)
        behind.append([*above, token] if goes_on else None)
    masks = process.masks(PROMPT + path, tokens, parents)
    assert masks.shape == (1 + len(tokens), 2) and masks.dtype == np.int32
    for mask, its in zip(masks, behind, strict=True):
        assert bits(mask) == ([True] * VOCAB if its is None else allowed_by_texts(its))
    assert np.array_equal(process.masks(PROMPT + path), masks[:1])


def test_behind_the_end_anything_goes():
    process = GuideLogitsProcessor(grammar(), 0)
    path = [*tokenizer().encode("{}"), EOS]
    assert (process.masks(path, [9], [-1]) == -1).all()


def test_as_a_logits_processor_it_makes_the_rest_impossible():
    process, scores = GuideLogitsProcessor(grammar(), 1), torch.randn(2, VOCAB)
    opened = tokenizer().encode("{")
    out = process(torch.tensor([[7, 9], [7, *opened]])[1:].repeat(2, 1), scores)
    left = [tokenizer().decode([token]) for token in (out[0] > -torch.inf).nonzero()[:, 0].tolist()]
    assert {"}", '"', " ", "\n"} <= set(left) and not {"{", "1", "a", "</s>"} & set(left)
    assert torch.equal(out == scores, out > -torch.inf) and torch.isfinite(scores).all()


def test_white_space_does_not_go_on_for_ever():
    process, path = GuideLogitsProcessor(grammar(), 0), tokenizer().encode("{")
    space = tokenizer().encode(" ")
    for _ in range(99):
        if not bits(process.masks(path)[0])[space[0]]:
            return
        path += space
    raise AssertionError("nothing but white space is JSON")


def test_what_breaks_the_grammar_is_said():
    process = GuideLogitsProcessor(grammar(), 0)
    with pytest.raises(ValueError, match="the guide cannot follow the text: "):
        process.masks(tokenizer().encode("abc"))


def test_equal_schemas_are_compiled_once():
    schema = {"type": "array", "items": {"type": "integer"}}
    assert grammar(schema) is grammar(json.dumps(schema)) is not grammar({"type": "array"})
    assert grammar(schema) is not grammar(schema, end_ids=(EOS, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guide.json_schema("{"), "the JSON schema is not JSON"),
        (lambda: Guide.json_schema({"enum": {1}}), "the JSON schema is not JSON"),
        (lambda: Guide.json_schema("[1]"), r"a JSON schema is an object, not \[1\]"),
        (lambda: grammar({"type": "animal"}), "the JSON schema is not supported: "),
        (lambda: grammar({"type": "string", "format": "name"}), "the JSON schema is not supported: "),
        (lambda: grammar({"not": {"type": "string"}}), "the JSON schema is not supported: "),
        (lambda: grammar({"$ref": "https://example.com/schema"}), "the JSON schema is not supported: "),
        (lambda: grammar(end_ids=()), "structured output needs an end token"),
        (lambda: grammar(tokenizer=ListTokenizer()), "structured output needs a fast tokenizer"),
        (lambda: grammar(tokenizer=None), "structured output needs a fast tokenizer"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
