"""How near texts are: embeddings that neither padding nor order changes, ROUGE-L by hand, chrF where there is one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from medusa_apar.eval import quality_similarity as similarity
from medusa_apar.eval.quality_similarity import Embedder, detail_figures, rouge_l
from medusa_apar.eval.quality_text import Detail
from tests.support.byte_chat import byte_tokenizer


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A random model of MiniLM's kind."""
    folder, tokenizer = tmp_path_factory.mktemp("embedder"), byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Embedder(folder)


TEXTS = ["a", "a longer text than the first", "", "walk at lunch", "a", "sleep " * 100]


def test_an_embedding_is_the_mean_of_a_text_alone(embedder):
    found = embedder.embed(TEXTS)
    assert found.shape == (len(TEXTS), 32)
    for text, vector in zip(TEXTS, found, strict=True):
        if text:
            ids = torch.tensor([embedder.tokenizer(text)["input_ids"][: similarity.MAX_TOKENS]])
            with torch.no_grad():
                mean = embedder.model(input_ids=ids).last_hidden_state[0].mean(0)
            assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)
    assert torch.equal(found[0], found[4])


def test_figures_of_details(embedder):
    text = "1. A: walk at lunch 2. B: sleep long 3. C: eat fruit"
    cut = [Detail("1. A:", 6, 19), Detail("2. B:", 26, 36), Detail("3. C:", 43, 52)]
    bodies = ["walk at lunch", "sleep long", "eat fruit"]
    assert [text[its.begin : its.end].strip() for its in cut] == bodies
    vectors = {
        name: embedder.embed([name])[0]
        for name in [*(text[i.begin : i.end] for i in cut), "What?", "1. A:", "2. B:", "3. C:"]
    }
    one, two, three = (vectors[text[its.begin : its.end]] for its in cut)
    found = detail_figures(embedder, "What?", text, cut)
    assert found["between_details"] == pytest.approx(float(one @ two + one @ three + two @ three) / 3, abs=1e-5)
    heads = float(one @ vectors["1. A:"] + two @ vectors["2. B:"] + three @ vectors["3. C:"]) / 3
    assert found["detail_to_head"] == pytest.approx(heads, abs=1e-5)
    asked = float((one + two + three) @ vectors["What?"]) / 3
    assert found["detail_to_prompt"] == pytest.approx(asked, abs=1e-5)
    assert detail_figures(embedder, "What?", "walk", [Detail("", 0, 4)])["between_details"] is None
    assert set(detail_figures(embedder, "What?", "walk", []).values()) == {None}
    twice = [Detail("x", 0, 4), Detail("y", 0, 4)]
    assert detail_figures(embedder, "What?", "walk", twice)["between_details"] == pytest.approx(1)


@pytest.mark.skipif(similarity.minilm() is None, reason="MiniLM is not installed")
def test_minilm_knows_what_is_alike():
    vectors = similarity.minilm().embed(
        ["How do I sleep better?", "Ways to improve your sleep.", "The stock market fell."]
    )
    assert float(vectors[0] @ vectors[1]) > 0.6 > 0.3 > float(vectors[0] @ vectors[2])


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("The cat sat on the mat.", "the cat lay on a mat", 2 * 4 / 12),
        ("a b c", "c b a", 2 * 1 / 6),
        ("a b", "a b", 1.0),
        ("a b", "c", 0.0),
        ("", "a", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l_by_hand(answer, reference, value):
    assert rouge_l(answer, reference) == pytest.approx(value)


WORDS = st.lists(st.sampled_from("abcd"), max_size=8)


def _longest(one, other):
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + _longest(one[:-1], other[:-1])
    return max(_longest(one[:-1], other), _longest(one, other[:-1]))


@given(WORDS, WORDS)
def test_rouge_l_is_of_the_longest_common_subsequence(one, other):
    expected = 2 * _longest(one, other) / (len(one) + len(other)) if one and other else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_chrf_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    score = similarity.chrf()
    assert score("the cat", "the cat") == pytest.approx(100) and score("xyz", "the cat") == 0
    assert score("the cats", "the cat") > score("a dog", "the cat")
