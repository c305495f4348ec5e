"""Prompts: the tokenizer's own template, Vicuna's for released APAR models, else the bare text."""

import sys

import pytest
from transformers import AutoTokenizer

from medusa_apar.models.chat import encode
from medusa_apar.models.sources import RELEASED_TOKENS
from tests.support.tokenizers import WORDS, save_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path, [*WORDS, *RELEASED_TOKENS, "USER:", "ASSISTANT:"])
    return AutoTokenizer.from_pretrained(tmp_path)


def words(tokenizer, question):
    encoded = encode(tokenizer, question)
    assert encoded["attention_mask"].tolist() == [[1] * encoded["input_ids"].shape[1]]
    return [token for token in tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist()) if token != "<unk>"]


def test_the_template_of_the_tokenizer_comes_first(tokenizer):
    tokenizer.chat_template = (
        "w5 {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    assert words(tokenizer, "w1 w2") == ["w5", "w1", "w2", "w6"]


def test_released_apar_models_get_vicunas_template(tokenizer):
    pytest.importorskip("fastchat")
    assert words(tokenizer, "w1 w2") == ["USER:", "w1", "w2", "ASSISTANT:"]


def test_without_fschat_the_message_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastchat.conversation", None)
    with pytest.raises(ValueError, match=r"pip install 'medusa-apar\[vicuna\]'"):
        encode(tokenizer, "w1")


def test_bare_text(tmp_path):
    save_tokenizer(tmp_path)
    assert words(AutoTokenizer.from_pretrained(tmp_path), "w1 w2") == ["w1", "w2"]


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode(tokenizer, " \n")
