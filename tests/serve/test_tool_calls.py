"""Calls of tools: parted from the text alike however that is cut, over HTTP whole and streamed, written or guided."""

import json
import re

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import medusa_apar
from medusa_apar.serve.tool_calls import ToolCall, ToolCalls, _moved
from tests.support.byte_chat import SPECIAL
from tests.support.models import CONTROL, EOS
from tests.support.openai_answers import CHAT, Server, byte_server, put_together, whole
from tests.support.serving import running

# ---- texts


def parted(pieces, guided=False):
    """The text that is said, and the calls."""
    calls = ToolCalls(guided)
    parts = [*map(calls.push, pieces), calls.end()]
    assert calls.count == sum(len(its) for _, its in parts)
    return "".join(said for said, _ in parts), [call for _, its in parts for call in its]


def called(*names_and_arguments):
    return [ToolCall(index, *each) for index, each in enumerate(names_and_arguments)]


WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5]}}\n</tool_call>'
CALL = ("weather", '{"city": "Köln", "days": [1, 2.5]}')
TEXTS = {
    "nothing called": (" a < b <tool_cal \n", " a < b <tool_cal \n", []),
    "a call": (WEATHER, "", [CALL]),
    "text around": (f"Let me see.\n\n{WEATHER}\n Done. ", "Let me see.\n\n\n Done. ", [CALL]),
    "two": (f'{WEATHER}\n{WEATHER}\t <tool_call>{{"name":"f"}}</tool_call>\n', "\n\t \n", [CALL, CALL, ("f", "{}")]),
    "not closed": (f"a {WEATHER.removesuffix('</tool_call>')}", "a ", [CALL]),
    "cut": ('a\n<tool_call>{"name": "f", "argu', 'a\n<tool_call>{"name": "f", "argu', []),
    "no JSON": (" <tool_call>{f(1)}</tool_call> b", " <tool_call>{f(1)}</tool_call> b", []),
    "spoken of": (f"Write <tool_call> first. {WEATHER}", "Write <tool_call> first. ", [CALL]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "no object": ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    "arguments that are none": (*['<tool_call>{"name": "f", "arguments": "x"}</tool_call>'] * 2, []),
    "half a character": (*['<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>'] * 2, []),
    "no number": (*['<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'] * 2, []),
    "one of two": (f'<tool_call>{{"name": 3}}</tool_call>\n{WEATHER}', '<tool_call>{"name": 3}</tool_call>\n', [CALL]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_parted_however_it_is_cut(name):
    text, said, calls = TEXTS[name]
    for pieces in ([text], text, re.findall(".{1,3}", text, re.S), re.findall(".{1,17}", text, re.S)):
        assert parted(pieces) == (said, called(*calls))


WORDS = ["<tool_call>", "</tool_call>", "<tool_call", ">", "{", "}", '{"name": "f"}', " ", "\n", "a", WEATHER, '"', "<"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12), st.data())
def test_any_text_is_parted_alike_and_none_of_it_is_lost(words, data):
    text = "".join(words)
    said, calls = parted([text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parted(pieces) == (said, calls)
    if not calls:
        assert said == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("a<{ \n\t\u3000", max_size=6), min_size=1, max_size=5), st.data())
def test_what_stands_beside_calls_comes_out_byte_for_byte(texts, data):
    whole = WEATHER.join(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parted(pieces) == ("".join(texts), called(*[CALL] * (len(texts) - 1)))


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_guided_text_is_one_call(end):
    text = '{"name": "f", "arguments": {"a": "</tool_call>"}}' + end
    assert parted(text, guided=True) == ("", called(("f", '{"a": "</tool_call>"}')))
    assert parted(text[:20], guided=True) == (text[:20], [])  # the limit has cut it


# ---- over HTTP

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {
        "type": "function",
        "function": {
            "name": "é",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/$defs/word"}},
                "required": ["a", "b"],
                "additionalProperties": False,
                "$defs": {"word": {"enum": ["你", "😀"]}},
            },
        },
    },
]
TEMPLATE = (
    "{% if tools %}{{ tools | length }}{% endif %}"
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}{{ m.content }}"
    "{% endfor %}"
)
# What the model writes when the prompt ends with a digit, piece by piece; a piece stands in one of them, and once.
SCRIPTS = {
    number: script.split("|")
    for number, script in (
        ("1", 'Let me| see.|\n\n|<tool_call>|\n{|"name": "weather"|, "arguments": {"city"|: "Köln"}}\n'),
        ("2", "No| call| is <tool|_call| here."),
        ("3", '<tool_call>{|"name": "f"}</tool|_call>\n|<tool_call>{"name": "g"|, "arguments": |{}}</tool_call>'),
        ("4", '<tool_call>{"name": |f}</tool_call> '),
    )
}


def script_writer():
    """Nothing but the last token says what comes next: an embedding that goes through unchanged, and a table."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [piece for script in SCRIPTS.values() for piece in script]
    assert len(set(pieces)) == len(pieces)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in pieces]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *names])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = byte_level, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[EOS], pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    size, width = len(vocabulary), 320
    config = LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=10,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    assert size <= width
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()
        for start, script in SCRIPTS.items():
            chain = [vocabulary[start], *(vocabulary[names[pieces.index(piece)]] for piece in script), EOS]
            for before, after in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[after, before] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return medusa_apar.attach(model, None, CONTROL, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(engine):
    with running(script_writer, engine=engine) as its, its.client() as client:
        yield Server(its, client)


def asked(script, **more):
    return {"messages": [{"role": "user", "content": script}], "temperature": 0, "max_tokens": 30, **more}


def heard(server, **body):
    """The one choice of an answer, whole and streamed, which have to be the same but for the calls' ids."""
    answer, chunks = server.ask(CHAT, **body), server.chunks(CHAT, **body)
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    streamed = [call for chunk in chunks for its in chunk["choices"] for call in its["delta"].get("tool_calls", [])]
    assert [call.pop("index") for call in streamed] == list(range(len(streamed)))
    calls = message.get("tool_calls", [])
    ids = [call.pop("id") for call in [*calls, *streamed]]
    assert len(set(ids)) == len(ids) and streamed == calls and {call["type"] for call in calls} <= {"function"}
    together = put_together(chunks)
    assert (together["text"], together["reason"]) == (message["content"] or "", reason)
    functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return message["content"], functions, reason


def test_what_the_model_calls_is_told(server):
    said = ("Let me see.\n\n", [("weather", {"city": "Köln"})], "tool_calls")
    assert heard(server, **asked("1", tools=TOOLS)) == said
    assert heard(server, **asked("2", tools=TOOLS)) == ("No call is <tool_call here.", [], "stop")
    assert heard(server, **asked("3", tools=TOOLS)) == ("\n", [("f", {}), ("g", {})], "tool_calls")
    assert heard(server, **asked("4", tools=TOOLS)) == ('<tool_call>{"name": f}</tool_call> ', [], "stop")


def test_nothing_is_called_where_nothing_can_be(server):
    text = "".join(SCRIPTS["1"])
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        assert heard(server, **asked("1", **more)) == (text, [], "stop")
    assert heard(server, **asked("1", tools=TOOLS, max_tokens=6))[1:] == ([], "length")  # in the middle of a call


def test_one_call_is_enough_where_they_must_not_be_parallel(server):
    body = asked("3", tools=TOOLS, parallel_tool_calls=False, stream=False)
    assert heard(server, **body) == (None, [("f", {})], "tool_calls")
    assert server.ask(CHAT, **body)["usage"]["completion_tokens"] == 3


def test_calls_behind_the_only_one_are_left_out_wherever_the_text_goes_on():
    """`min_tokens` may let it."""
    two = '<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call> said'
    parts = ToolCalls(once=True)
    (said, calls), (rest, more) = parts.push(two), parts.end()
    assert [call.name for call in calls + more] == ["a"] and said + rest == "\n said"


def test_a_schema_within_another_keeps_its_references_and_its_data():
    schema = {
        "$ref": "#/$defs/x",
        "$defs": {"x": {"const": {"$ref": "#/y"}}, "z": {"$ref": "#anchor"}, "own": {"$id": "u", "$ref": "#/a"}},
    }
    moved = _moved(schema, "#/at")
    assert moved["$ref"] == "#/at/$defs/x" and moved["$defs"] == schema["$defs"]
    assert _moved({"$ref": "#"}, "#/at") == {"$ref": "#/at"}


def test_an_answer_that_may_call_has_one_thread(server):
    told = server.ask(CHAT, **asked("1", tools=TOOLS, apar={"events": True}))["apar"]
    assert told["stats"]["threads"] == 1
    error = server.refusal(CHAT, asked("1", tools=TOOLS, apar={"fork": True}))
    assert error["param"] == "apar.fork" and "tools" in error["message"]
    assert server.ask(CHAT, **asked("1", tools=TOOLS, tool_choice="none", apar={"fork": True}))


def test_the_official_client_goes_on_with_what_was_called(server):
    with openai.OpenAI(base_url=f"{server.its.url}/v1", api_key="x", max_retries=0) as client:
        plain = {"model": "tiny", "temperature": 0, "max_tokens": 30, "tools": TOOLS}
        question = {"role": "user", "content": "1"}
        answer = client.chat.completions.create(**plain, messages=[question], tool_choice="auto")
        message = answer.choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Köln"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        after = client.chat.completions.create(**plain, messages=[question, message.model_dump(), result])
        assert after.choices[0].message.content == "No call is <tool_call here."


CHOICES = [
    ("always", "must be"),
    ({"type": "function"}, "must be"),
    ({"type": "function", "function": {"name": "f", "more": 1}}, "must be"),
    ({"type": "function", "function": {"name": "other"}}, "'other', which is none of the tools"),
    ({"type": "allowed_tools", "allowed_tools": {}}, "must be"),
]


@pytest.mark.parametrize(("choice", "words"), CHOICES, ids=str)
def test_other_choices_are_refused_by_name(server, choice, words):
    error = server.refusal(CHAT, asked("1", tools=TOOLS, tool_choice=choice))
    assert error["param"] == "tool_choice" and words in error["message"]
    assert server.refusal(CHAT, asked("1", tool_choice="required"))["param"] == "tool_choice"
    both = asked("1", tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    assert server.refusal(CHAT, both)["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("choice", "temperature"), [("required", 0), ({"type": "function", "function": {"name": "é"}}, 1)], ids=str
)
def test_what_has_to_be_called_is_called(choice, temperature):
    """By a model that knows nothing of tools."""
    pytest.importorskip("llguidance")
    with byte_server(seed=3) as server:
        server.tokenizer.chat_template = TEMPLATE
        body = asked("aé", tools=TOOLS[1:] if choice == "required" else TOOLS, tool_choice=choice)
        said, calls, reason = heard(server, **body | {"temperature": temperature, "seed": 4, "max_tokens": 480})
        ((name, arguments),) = calls
        assert (said, name, reason) == (None, "é", "tool_calls")
        assert set(arguments) == {"a", "b"} and arguments["a"] in (True, False) and arguments["b"] in ("你", "😀")
        cut = server.ask(CHAT, **body | {"max_tokens": 9})
        assert whole(cut)["reason"] == "length" and whole(cut)["text"].lstrip().startswith("{")
