"""What is asked, and what is not asked twice."""

import gzip
import json

from medusa_apar.commands.cli import main
from medusa_apar.heads.ask import answered, read_prompts


def test_half_a_line_left_by_a_kill_is_answered_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c", "thr')
    assert answered(path) == {"a", "b"}
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


def test_prompts_are_read_as_corpora_are(tmp_path, capsys):
    turns = [("gpt", "cut"), ("human", "why"), ("gpt", "so"), ("human", "how"), ("gpt", "thus")]
    share = [{"id": "s1", "conversations": [{"from": who, "value": text} for who, text in turns]}]
    (tmp_path / "share.json").write_text(json.dumps(share))
    chat = {"messages": [{"role": "user", "content": "when"}, {"role": "system", "content": "x"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    read = {name: messages for name, messages, _ in read_prompts([tmp_path / "share.json", tmp_path / "chat.jsonl"])}
    assert [(turn["role"], turn["content"]) for turn in read["s1"]] == [
        ("user", "why"),
        ("assistant", "so"),
        ("user", "how"),
    ]
    assert read["chat.jsonl/1"] == [{"role": "user", "content": "when"}]
    broken = tmp_path / "cut.jsonl.gz"
    broken.write_bytes(gzip.compress((json.dumps(chat) + "\n").encode() * 300)[:-30])
    assert main(["train-heads", "--model", "nowhere", "--out", str(tmp_path / "out"), "--prompts", str(broken)]) == 2
    err = capsys.readouterr().err
    assert "cut.jsonl.gz cannot be read" in err and err.count("\n") == 1
