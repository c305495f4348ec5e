"""--bad-lines, in every command that reads corpora: a line that cannot be used stops it before any work, or is counted.

A conversation that the model's chat template refuses is such a line. Half of all public templates refuse some.
"""

import json

import pytest

from medusa_apar.commands.cli import main
from medusa_apar.heads import MedusaHeads
from medusa_apar.models.chat import encode, encode_messages

# Gemma's and Mistral's words, and one that fails by itself.
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
TEMPLATES = {
    "no system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        f"{{% for m in messages %}}{TURN}{{% endfor %}}",
        "System role not supported",
    ),
    "alternation": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}"
        f"{{% endif %}}{TURN}{{% endfor %}}",
        "conversation roles must alternate user/assistant",
    ),
    "fails": (
        "{% for m in messages %}{{ {'user': 'U', 'assistant': 'A'}[m['role']] + m['content'] }}{% endfor %}",
        "dict object' has no attribute 'system'",
    ),
}
REFUSED = {
    "no system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "alternation": [{"role": "user", "content": "Why?"}, {"role": "user", "content": "And how?"}],
    "fails": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}
COMMANDS = ("answer", "data", "finetune", "train-heads --prompts", "train-heads --copy", "calibrate")
ANSWER = "\n".join(f"{n}. Head {n}: this detail is written in quite a few words." for n in range(1, 5))


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A model with heads."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    MedusaHeads.random(model, 2).save_pretrained(tmp_path / "model" / "medusa")
    return tmp_path / "model"


def corpus(path, bad):
    """Ten good lines, and a bad one as the fifth."""
    lines = [
        json.dumps(
            {
                "id": f"c{n}",
                "messages": [
                    {"role": "user", "content": f"Question {n}?"},
                    {"role": "assistant", "content": f"{ANSWER} {n}"},
                ],
            }
        )
        for n in range(10)
    ]
    path.write_text("\n".join([*lines[:4], bad, *lines[4:]]) + "\n")
    return path


def run(command, folder, corpus, out, *more):
    name, _, option = command.partition(" ")
    small = ["--max-new-tokens", "4", "--dtype", "float32"]  # too short to loop
    arguments = {
        "answer": ["--model", folder, "--prompts", corpus, *small],
        "data": [corpus],
        "train-heads": ["--model", folder, option, corpus, "--epochs", "0.01", "--num-heads", "1", *small],
        "calibrate": ["--model", folder, "--prompts", corpus, *small],
        "finetune": ["--base", folder, "--data", out / "data", "--rank", "1", "--dtype", "float32", *more],
    }[name]
    if name == "finetune":
        made = main(["data", str(corpus), "--out", str(out / "data"), *more])
        if made:
            return made
    return main([name, *map(str, arguments), "--out", str(out), *more])


def reported(out):
    """What the report, or else the log, says was left out."""
    report = json.loads((out / "report.json").read_text())
    if "left_out" in report or "dropped" in report:
        return report.get("left_out") or report.get("dropped")
    log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return next(entry["left_out"] for entry in log if "left_out" in entry)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "data"])
def test_what_the_chat_template_refuses(folder, tmp_path, capsys, tokenizer, command, kind):
    template, words = TEMPLATES[kind]
    (folder / "chat_template.jinja").write_text(template)
    answered = {"messages": [*REFUSED[kind], {"role": "assistant", "content": ANSWER}]}
    path, out = corpus(tmp_path / "c.jsonl", json.dumps(answered)), tmp_path / "out"
    assert run(command, folder, path, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    place = "examples.jsonl:5" if command == "finetune" else "c.jsonl:5"
    assert f"{place}: the conversation is refused by the model's chat template, which says: " in error
    assert words in error
    assert {found.name for found in out.iterdir()} <= {"log.jsonl", "data"}
    assert run(command, folder, path, out, "--bad-lines", "skip") == 0
    assert "left out: 1 the conversation is refused by the model's chat template" in capsys.readouterr().err
    ((reason, entry),) = reported(out).items()
    assert reason == "the conversation is refused by the model's chat template" and entry["count"] == 1
    assert entry["first"][0].endswith(place)


@pytest.mark.parametrize("bad", ["{", "5", '{"messages": [{"role": "user", "content": 5}]}', '{"messages": {"a": []}}'])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_conversation(folder, tmp_path, capsys, command, bad):
    path, out = corpus(tmp_path / "c.jsonl", bad), tmp_path / "out"
    assert run(command, folder, path, out) == 2
    error = capsys.readouterr().err
    assert "c.jsonl:5: " in error and error.count("\n") == 1
    if command != "finetune":  # reads what `data` made
        assert run(command, folder, path, out, "--bad-lines", "skip") == 0
        ((_, entry),) = reported(out).items()
        assert entry == {"count": 1, "first": [f"{path}:5"]}


NO_ANSWERS = {
    "{": "broken JSON",
    '{"prompt_ids": [5]}': "no answer record with prompt_ids and threads",
    '{"prompt_ids": [5], "threads": [{"token_ids": "abc"}]}': "an impossible answer record",
    '{"prompt_ids": [], "threads": [{"token_ids": [5]}]}': "an impossible answer record",
}


@pytest.mark.parametrize("bad", NO_ANSWERS)
@pytest.mark.parametrize("command", ["train-heads", "calibrate"])
def test_what_is_no_answer(folder, tmp_path, capsys, command, bad):
    good = {"prompt_ids": [40, 41], "threads": [{"parent": -1, "fork_index": -1, "token_ids": [50, 51, 52, 53, 54]}]}
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("".join(f"{line}\n" for line in [*[json.dumps(good)] * 3, bad]))
    arguments = [command, "--model", str(folder), "--answers", str(path), "--out", str(out), "--dtype", "float32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:4: " in error and error.count("\n") == 1 and not out.exists()
    if command == "train-heads":
        assert main([*arguments, "--bad-lines", "skip", "--num-heads", "1", "--epochs", "0.01"]) == 0
        assert f"left out: 1 {NO_ANSWERS[bad]}, first {path}:4\n" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["{", "5", '{"id": "e"}', '{"id": 5, "kind": "plain", "messages": [], "tree": []}',
                                 '{"id": "e", "kind": "plain", "messages": [{"role": "user"}], "tree": ["x"]}',
                                 '{"id": "e", "kind": "other", "messages": [], "tree": {"a": 1}}'])  # fmt: skip
def test_what_is_no_example(folder, tmp_path, capsys, bad):
    path, out = corpus(tmp_path / "c.jsonl", ""), tmp_path / "out"
    assert main(["data", str(path), "--out", str(tmp_path / "data")]) == 0
    with (tmp_path / "data" / "examples.jsonl").open("a") as file:
        file.write(f"{bad}\n")
    arguments = ["finetune", "--base", folder, "--data", tmp_path / "data", "--out", out, "--rank", 1]
    assert main([*map(str, arguments), "--dtype", "float32"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "examples.jsonl:11: " in error and not (out / "adapter").exists()
    assert main([*map(str, arguments), "--dtype", "float32", "--bad-lines", "skip"]) == 0
    assert sum(entry["count"] for entry in reported(out).values()) == 1


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_question_alone_is_encoded_or_refused_in_the_templates_words(tokenizer, kind, monkeypatch):
    template, words = TEMPLATES[kind]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert encode(tokenizer, "Why?")["input_ids"].shape[1] > 4
    with pytest.raises(ValueError, match="refused by the model's chat template, which says: ") as refusal:
        encode_messages(tokenizer, REFUSED[kind])
    assert words in str(refusal.value)
