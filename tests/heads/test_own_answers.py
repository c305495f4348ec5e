"""A model's own answers become a corpus; a stopped run goes on to the same one."""

import json
import random
from contextlib import contextmanager

import pytest
import torch

from medusa_apar.commands.cli import main
from medusa_apar.finetune.corpus import read_examples
from medusa_apar.heads.ask import Limits, fitting_prompts, read_prompts
from medusa_apar.job import Job
from tests.support.byte_chat import byte_model, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return byte_model()


@pytest.fixture
def base(tmp_path, model, tokenizer):
    """Ends about one answer in three within 12 tokens."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.get_input_embeddings().weight[2].mul_(6)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def prompts(path, count=9):
    rows = [{"id": f"p{n}", "messages": [{"role": "user", "content": f"Question number {n}?"}]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(base, prompts, out, *more):
    arguments = ["answer", "--model", base, "--prompts", prompts, "--out", out, "--max-new-tokens", 12, "--batch", 4,
                 "--temperature", 1.5, "--dtype", "float32", *more]  # fmt: skip
    return main([str(argument) for argument in arguments])


def test_answers_that_end_become_a_corpus(tmp_path, base):
    assert answer(base, prompts(tmp_path / "p.jsonl"), tmp_path / "own") == 0
    report = json.loads((tmp_path / "own/report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "own/chats.jsonl").read_text().splitlines()]
    assert report["asked"] == 9 and 0 < report["kept"] == len(rows) < 9
    assert {example.id for example in read_examples([tmp_path / "own/chats.jsonl"])} <= {f"p{n}" for n in range(9)}


def test_a_stopped_run_goes_on_to_the_same_answers(tmp_path, base, monkeypatch):
    from medusa_apar.heads import own_answers

    questions = prompts(tmp_path / "p.jsonl")
    assert answer(base, questions, tmp_path / "whole") == 0
    original, calls = own_answers._answers, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(own_answers, "_answers", killed)
    assert answer(base, questions, tmp_path / "cut") == 130
    monkeypatch.undo()
    assert answer(base, questions, tmp_path / "cut") == 0
    assert (tmp_path / "cut/chats.jsonl").read_text() == (tmp_path / "whole/chats.jsonl").read_text()


def test_a_missing_file_is_refused(tmp_path, base, capsys):
    assert answer(base, tmp_path / "no.jsonl", tmp_path / "own") == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err


def test_a_kill_between_the_two_files_loses_no_answer(tmp_path, base, monkeypatch):
    from medusa_apar.heads import own_answers

    questions = prompts(tmp_path / "p.jsonl")
    assert answer(base, questions, tmp_path / "whole") == 0
    original = own_answers.append_lines

    def killed(path, rows):
        if path.name == "asked.jsonl" and (tmp_path / "cut/chats.jsonl").stat().st_size:
            raise KeyboardInterrupt
        original(path, rows)

    monkeypatch.setattr(own_answers, "append_lines", killed)
    assert answer(base, questions, tmp_path / "cut") == 130
    monkeypatch.undo()
    assert answer(base, questions, tmp_path / "cut") == 0
    assert (tmp_path / "cut/chats.jsonl").read_text() == (tmp_path / "whole/chats.jsonl").read_text()
    assert len((tmp_path / "cut/asked.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("change", [["--temperature", 0.5], ["--top-p", 0.4], ["--max-new-tokens", 13], ["--seed", 5],
                                    ["--batch", 3]])  # fmt: skip
def test_answers_made_otherwise_are_not_added(tmp_path, base, capsys, change):
    questions = prompts(tmp_path / "p.jsonl", 2)
    assert answer(base, questions, tmp_path / "own") == 0
    before = (tmp_path / "own/asked.jsonl").read_bytes()
    assert answer(base, prompts(tmp_path / "p.jsonl", 4), tmp_path / "own", *change) == 2
    assert f"made with another {change[0][2:].replace('-', '_')} (" in capsys.readouterr().err
    assert (tmp_path / "own/asked.jsonl").read_bytes() == before


def test_answers_of_another_model_are_not_added(tmp_path, base, model, capsys):
    questions = prompts(tmp_path / "p.jsonl", 2)
    assert answer(base, questions, tmp_path / "own") == 0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(base)
    assert answer(base, questions, tmp_path / "own") == 2
    assert "made with another model (" in capsys.readouterr().err


def test_a_report_without_a_time_limit_is_json(tmp_path, base):
    def refuse(constant):
        raise AssertionError(constant)

    assert answer(base, prompts(tmp_path / "p.jsonl", 2), tmp_path / "own") == 0
    report = json.loads((tmp_path / "own/report.json").read_text(), parse_constant=refuse)
    assert report["settings"]["max_minutes"] is None


def test_only_a_tuned_model_answers_as_tuned(tmp_path, base, capsys):
    """--tuned insists on the tuning, so that nobody takes the base's answers for the tuned model's."""
    questions = prompts(tmp_path / "p.jsonl", 2)
    assert answer(base, questions, tmp_path / "own", "--tuned") == 2
    assert "has no control tokens" in capsys.readouterr().err
    (base / "apar_config.json").write_text(json.dumps({"fork_token_id": 3, "child_token_id": 4}))
    assert answer(base, questions, tmp_path / "own", "--tuned") == 0
    assert len((tmp_path / "own/asked.jsonl").read_text().splitlines()) == 2


class Watched(Job):
    """Keeps how far its bars came, by their names."""

    @contextmanager
    def bar(self, description, total, done=0):
        with super().bar(description, total, done) as bar:
            yield bar
            self.bars = getattr(self, "bars", {}) | {description: (self._progress.tasks[-1].completed, total)}


@pytest.mark.parametrize(("count", "measured"), [(None, 9), (2, 3)])
def test_prompts_are_measured_under_a_bar_and_their_tokens_not_kept(tmp_path, tokenizer, count, measured):
    order = read_prompts([prompts(tmp_path / "p.jsonl")])
    random.Random(0).shuffle(order)
    long = order[1]
    long.messages[0]["content"] *= 400
    job = Watched(tmp_path / "out", "answer", {})
    with job:
        found = fitting_prompts(tokenizer, sorted(order), Limits(count), job)
    assert found == ([prompt for prompt in order if prompt is not long][:count], 1)
    assert job.bars == {"measuring prompts": (measured, 9)}
