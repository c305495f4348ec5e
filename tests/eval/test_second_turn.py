"""What the prefix cache has of a chat's second turn: no more than it says, and no less than up to the first fork."""

import json

import pytest

from medusa_apar.eval import second_turn
from medusa_apar.eval.prompts import Prompt
from medusa_apar.eval.second_turn import Turn
from tests.support.bytes_writer import bytes_writer

QUESTIONS = [Prompt(str(n), "", text) for n, text in enumerate(("aé?", "你 a", "😀\n é"))]


@pytest.fixture(scope="module")
def found():
    return second_turn.measure(bytes_writer(3), QUESTIONS, 24)


def test_all_up_to_the_first_fork_is_there(found):
    assert list(found) == ["forks", "one thread"]
    assert any(turn.forks for turn in found["forks"]) and not any(turn.forks for turn in found["one thread"])
    for turn in [*found["forks"], *found["one thread"]]:
        # A last token was never fed; nothing of another question counts, though all begin alike.
        assert turn.before_fork - 1 <= turn.cached <= turn.before_fork and 0 < turn.share < 1
        assert 0 < turn.first_prompt <= turn.before_fork <= turn.first_prompt + turn.answer
    for forked, plain in zip(*found.values(), strict=True):
        assert forked.first_prompt == plain.first_prompt and (forked.forks or forked.cached == plain.cached)


def test_shares_are_of_all_tokens():
    turns = [Turn("a", 100, 50, 60, 20, 45, 2), Turn("b", 300, 30, 30, 30, 9, 0)]
    told = second_turn.summary(turns)
    assert told["share"] == {"cached": 0.2, "before_fork": 0.225, "first_prompt": 0.125}
    assert told["mean_share"] == 0.3 and (told["questions"], told["forked"], told["prompt_tokens"]) == (2, 1, 400)


def test_the_command_writes_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(second_turn, "load", lambda model, quantize: bytes_writer(3))
    words, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "second_turn.json"
    words.write_text("".join(json.dumps({"id": n, "prompt": "aé"[n]}) + "\n" for n in range(2)))
    second_turn.main(["--prompts", str(words), "--max-new-tokens", "6", "--out", str(out)])
    written = json.loads(out.read_text())
    assert [turn["id"] for turn in written["turns"]["forks"]] == ["0", "1"] and written["cpu"] and written["versions"]
    assert written["found"]["one thread"] == json.loads(capsys.readouterr().out)["one thread"]
    with pytest.raises(SystemExit):
        second_turn.main(["--max-new-tokens", "0"])
