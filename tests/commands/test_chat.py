"""`medusa-apar chat`: what it answers over several turns, on a terminal and in a pipe, on tiny models."""

import io
import re
import signal

import pytest
import torch
from rich.console import Console

from medusa_apar import Sampling, attach
from medusa_apar.commands import cli
from medusa_apar.commands.chat import Chat
from medusa_apar.models.chat import encode_messages
from tests.support.byte_chat import byte_model, byte_tokenizer
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer

LIMIT = 24


@pytest.fixture(scope="module")
def bytes_apar():
    """Its chat template shows the model the whole conversation, to which its answers differ."""
    model = byte_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return attach(model, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def forking_apar():
    return attach(forking_model(2), apar=CONTROL, tokenizer=tiny_tokenizer())


def chat_of(apar, engine, terminal=False, fork="auto", limit=LIMIT):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=30)
    chat = Chat(apar, engine, console, Sampling(), fork, limit)
    return chat, console.file


def generated(apar, messages, **options):
    inputs = encode_messages(apar.tokenizer, messages)
    ids = apar.generate(**inputs, max_new_tokens=LIMIT, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return apar.tokenizer.decode(ids, skip_special_tokens=True)


def test_every_turn_reads_those_before_it_until_they_are_forgotten(bytes_apar, capsys):
    with bytes_apar.engine() as engine:
        chat, _ = chat_of(bytes_apar, engine)
        chat.run(["Hello there.\n", "\n", "And then?\n"])
        asked = chat.messages[::2]
        assert [its["content"] for its in asked] == ["Hello there.", "And then?"]
        answers = [generated(bytes_apar, chat.messages[:1]), generated(bytes_apar, chat.messages[:3])]
        assert [its["content"] for its in chat.messages[1::2]] == answers
        chat.run(["/reset", "And then?"])
        alone = generated(bytes_apar, [{"role": "user", "content": "And then?"}])
        assert [its["content"] for its in chat.messages] == ["And then?", alone] and alone != answers[1]
        assert engine.stats.requests == 3
    assert "".join(capsys.readouterr().out.split()) == "".join("".join([*answers, alone]).split())


def test_forks_are_switched_off_and_on(forking_apar, capsys):
    question = [{"role": "user", "content": "w1 w2 w9"}]
    one, several = (generated(forking_apar, question, fork=fork) for fork in ("off", "auto"))
    assert one != several
    with forking_apar.engine() as engine:
        chat, _ = chat_of(forking_apar, engine)
        chat.run(["/fork off", "w1 w2 w9"])
        assert chat.messages[1]["content"] == one and engine.stats.forks == 0
        chat.run(["/reset", "/fork auto", "/fork sometimes", "w1 w2 w9", "/quit", "never asked"])
        assert chat.messages[1]["content"] == several and len(chat.messages) == 2 and engine.stats.forks > 0
    assert "/fork takes one of auto, off, lists, not sometimes." in capsys.readouterr().err


def test_on_a_terminal_lanes_grow_and_the_text_is_left(forking_apar):
    with forking_apar.engine() as engine:
        chat, screen = chat_of(forking_apar, engine, terminal=True)
        chat.run(["w1 w2 w9", "/nonsense"])
    shown = screen.getvalue()
    assert "thread 1" in shown and "tokens in" in shown and "/nonsense. /help says what there is." in shown
    left = "".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).split())
    assert "".join(chat.messages[1]["content"].split()) in left


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_stops_the_answer_alone(bytes_apar, terminal):
    question = [{"role": "user", "content": "Hello there."}]
    whole, before = generated(bytes_apar, question), signal.getsignal(signal.SIGINT)
    with bytes_apar.engine() as engine:
        chat, _ = chat_of(bytes_apar, engine, terminal)
        step, engine.step = engine.step, lambda: (steps.append(1), len(steps) == 5 and press(), step())[-1]
        steps, press = [], lambda: signal.raise_signal(signal.SIGINT)
        chat.run(["Hello there.\n"])
        stopped = chat.messages[1]["content"]
        assert whole.startswith(stopped) and 0 < len(stopped) < len(whole)
        chat.run(["/reset", "Hello there.\n"])
        assert chat.messages[1]["content"] == whole
        assert engine.ledger.pool.in_use == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_step_leaves_nothing_in_the_engine(bytes_apar):
    with bytes_apar.engine() as engine:
        chat, _ = chat_of(bytes_apar, engine)
        add, engine.add = engine.add, lambda request: (add(request), signal.raise_signal(signal.SIGINT))
        chat.run(["Hello there.\n"])
        assert engine.unfinished == 0 and engine.stats.steps == 1


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(bytes_apar, capsys):
    with bytes_apar.engine() as engine:
        chat, _ = chat_of(bytes_apar, engine)
        chat.run(["Hello there.", "long " * 400])
        assert len(chat.messages) == 2
    assert "/reset begins anew." in capsys.readouterr().err


def test_the_command_reads_a_pipe(bytes_apar, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda args: bytes_apar)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello there.\n")))
    assert cli.main(["chat", "--max-new-tokens", str(LIMIT)]) == 0
    out = capsys.readouterr().out
    assert "".join(out.split()) == "".join(generated(bytes_apar, [{"role": "user", "content": "Hello there."}]).split())
