"""Corpora of every schema are read; what is bad is named by its line; what is dropped is counted."""

import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest

from medusa_apar.commands.cli import main
from medusa_apar.finetune.corpus import BadCorpus, Drops, load_examples, read_examples, repeated_share
from medusa_apar.finetune.rules import splice

LIST = "\n".join(f"{n}. Head {n}: this part explains the idea in some more words." for n in range(1, 4))


def conversation(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]


def write(path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_reading_files(tmp_path):
    messages = conversation("Tips?", LIST)
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    write(plain, {"messages": messages})
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps({"id": "x", "messages": conversation("Other tips?", LIST)}) + "\n")
    first, second = read_examples([plain, packed])
    assert (first.id, second.id) == ("a.jsonl/1", "x")
    assert first.kind == "titled" and splice(second.tree) == LIST and first.messages == messages[:1]


@pytest.mark.parametrize("as_array", [True, False])
def test_sharegpt_json(tmp_path, as_array):
    turns = [
        ("gpt", "cut off"),
        ("system", "Be brief."),
        ("human", "Tips?"),
        ("gpt", LIST),
        ("human", "x"),
        ("gpt", "y"),
    ]
    record = {"id": "c", "conversations": [{"from": role, "value": text} for role, text in turns]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps([record] if as_array else record) + "\n")
    (last,) = read_examples([path])
    assert splice(last.tree) == "y" and [m["role"] for m in last.messages] == ["system", "user", "assistant", "user"]
    last, first = read_examples([path], all_turns=True)
    assert (last.id, first.id) == ("c", "c#1")
    assert splice(first.tree) == LIST and [m["content"] for m in first.messages] == ["Be brief.", "Tips?"]


def test_instruction_records(tmp_path):
    path = write(tmp_path / "i.jsonl", {"instruction": "Sum up.", "input": "A text.", "output": "A sum."})
    (example,) = read_examples([path])
    assert example.messages == [{"role": "user", "content": "Sum up.\n\nA text."}] and splice(example.tree) == "A sum."


BAD = [
    ("{broken", "broken JSON"),
    ([1, 2], "no JSON object"),
    ({"text": "x"}, "wrong schema"),
    ({"messages": [{"role": "user"}]}, "wrong schema"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
    ({"messages": []}, "empty conversation"),
    ({"messages": conversation("only a question")}, "no answer"),
    ("[" * 200_000, "broken JSON"),
    (r'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}', "broken text"),
    (
        r'{"id": "\udfff", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}',
        "broken text",
    ),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_bad_record_is_refused_with_its_line_or_skipped_and_counted(tmp_path, record, reason):
    good = {"id": "good", "messages": conversation("Tips?", LIST)}
    path = write(tmp_path / "c.jsonl", good, "", record, {"messages": conversation("More?", "Yes, more.")})
    with pytest.raises(BadCorpus, match=rf"c\.jsonl:3: {reason}"):
        list(read_examples([path]))
    drops = Drops(skip_bad=True)
    assert len(list(read_examples([path], drops))) == 2
    assert drops.counts == {reason: 1} and drops.places[reason] == [f"{path}:3"]


def test_empty_repeated_and_looping_answers_are_dropped(tmp_path):
    loop = "and so on and on it goes " * 30
    records = [conversation("a", " "), conversation("b", LIST), conversation("b", LIST), conversation("c", loop)]
    drops = Drops()
    path = write(tmp_path / "c.jsonl", *({"messages": messages} for messages in records))
    assert len(list(read_examples([path], drops))) == 1
    assert drops.counts == {"empty answer": 1, "duplicate": 1, "looping answer": 1}


def test_repeated_share_counts_what_came_before():
    assert repeated_share(list("abcdefgh")) == 0 and repeated_share(["a"]) == 0
    assert repeated_share(list("abcdabcd")) == pytest.approx(1 / 5)
    assert repeated_share(["a"] * 13) == pytest.approx(9 / 10)


def test_a_data_set_of_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", {"messages": conversation("Tips?", LIST)})
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        (example,) = read_examples(["owner/name:train"])
    finally:
        os.chdir(here)
    assert example.kind == "titled"


def test_the_command_writes_examples_and_a_report(tmp_path, capsys):
    records = [
        {"id": str(n), "messages": conversation(f"q{n}", LIST if n % 2 else f"Plain answer {n}.")} for n in range(8)
    ]
    corpus, out = write(tmp_path / "c.jsonl", *records, "{"), tmp_path / "out"
    assert main(["data", corpus, "--out", str(out)]) == 2
    assert "c.jsonl:9: broken JSON" in capsys.readouterr().err and not (out / "examples.jsonl").exists()
    assert main(["data", corpus, "--out", str(out), "--bad-lines", "skip", "--show", "1"]) == 0
    assert "[Fork]⟨[Child] this part" in capsys.readouterr().err
    examples = list(load_examples(out / "examples.jsonl"))
    assert examples == list(read_examples([corpus], Drops(skip_bad=True)))
    report = json.loads((out / "report.json").read_text())
    assert (report["examples"], report["forking"], report["forks"]) == (8, 4, 12)
    assert report["kinds"] == {corpus: {"plain": 4, "titled": 4}} and report["whole"] == {"few parts": 4}
    assert report["dropped"]["broken JSON"] == {"count": 1, "first": [f"{corpus}:9"]}


def test_agreement_keeps_answers_that_fork_where_the_others_do(tmp_path):
    def corpus(name, answers):
        return write(
            tmp_path / name, *({"id": str(n), "messages": conversation(f"q{n}", a)} for n, a in answers.items())
        )

    theirs = corpus("t.jsonl", {1: LIST, 2: "Plain.", 3: LIST, 4: "Plain."})
    own = corpus("o.jsonl", {1: LIST + " ", 2: LIST, 3: "Plain.", 4: "Quite plain.", 5: LIST})
    assert main(["data", own, "--agree-with", theirs, "--out", str(tmp_path / "out")]) == 0
    assert [example.id for example in load_examples(tmp_path / "out" / "examples.jsonl")] == ["1", "4"]
    dropped = json.loads((tmp_path / "out/report.json").read_text())["dropped"]
    assert dropped["not in the other corpus"] == {"count": 1, "first": ["5"]}
    more = ["--agree-with", theirs, "--disagreeing", "whole", "--out", str(tmp_path / "whole")]
    assert main(["data", own, *more]) == 0
    found = {example.id: example for example in load_examples(tmp_path / "whole" / "examples.jsonl")}
    assert {id: example.tree.forks > 0 for id, example in found.items()} == {"1": True, "2": False, "4": False}
    assert (splice(found["2"].tree), found["2"].kind, found["2"].reason) == (LIST, "plain", "other corpus whole")


def test_disagreeing_needs_a_corpus_to_agree_with(tmp_path, capsys):
    own = write(tmp_path / "o.jsonl", {"messages": conversation("q", LIST)})
    assert main(["data", own, "--disagreeing", "whole", "--out", str(tmp_path / "out")]) == 2
    assert "--disagreeing needs --agree-with" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_agreement_is_by_the_same_rules_and_with_something(tmp_path, capsys):
    """Depth and turns hold for both sides; a corpus without a usable answer agrees with nothing."""
    turns = {"id": "a", "messages": conversation("q", LIST, "r", "Plain.")}
    own, theirs = write(tmp_path / "o.jsonl", turns), write(tmp_path / "t.jsonl", turns)
    for more, ids in ((["--all-turns"], ["a", "a#1"]), (["--all-turns", "--max-depth", "0"], ["a", "a#1"])):
        out = tmp_path / "-".join(["out", *more])
        assert main(["data", own, "--agree-with", theirs, "--out", str(out), *more]) == 0
        assert [example.id for example in load_examples(out / "examples.jsonl")] == ids
    empty = write(tmp_path / "e.jsonl", {"messages": conversation("q", " ")})
    assert main(["data", own, "--agree-with", empty, "--out", str(tmp_path / "none")]) == 2
    assert "e.jsonl holds no usable answer to agree with" in capsys.readouterr().err


def test_what_is_left_out_of_the_corpus_to_agree_with_is_reported(tmp_path, capsys):
    record = {"id": "a", "messages": conversation("q", LIST)}
    own, theirs = write(tmp_path / "o.jsonl", record), write(tmp_path / "t.jsonl", record, "{")
    more = ["--agree-with", theirs, "--bad-lines", "skip", "--out", str(tmp_path / "out")]
    assert main(["data", own, *more]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["dropped"] == {}
    assert report["agree_with_dropped"] == {"broken JSON": {"count": 1, "first": [f"{theirs}:2"]}}
    assert f"dropped of --agree-with: 1 broken JSON, first {theirs}:2" in capsys.readouterr().err


def test_what_is_no_regular_file_is_named(tmp_path, capsys):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    assert main(["data", str(pipe), "--out", str(tmp_path / "out")]) == 2
    said = f"medusa-apar: {pipe} is no regular file: write what it gives into one first\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (0, "o/n is neither a file nor a data set that can be had (the line is cut)"),
        (3, "o/n breaks off after row 3 (the line is cut)"),
    ],
)
def test_a_data_set_that_breaks_off_is_said(monkeypatch, rows, words):
    def load_dataset(name, split, streaming):
        for n in range(rows):
            yield {"messages": conversation(f"q{n}", "Plain.")}
        raise ConnectionError("the line is cut")

    stub = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    read = read_examples(["o/n"])
    assert len([next(read) for _ in range(rows)]) == rows
    with pytest.raises(BadCorpus) as error:
        next(read)
    assert str(error.value) == words


def test_an_answer_of_two_corpora_is_taken_once(tmp_path):
    corpora = [write(tmp_path / f"{name}.jsonl", {"id": name, "messages": conversation("q", LIST)}) for name in "ab"]
    assert main(["data", *corpora, "--out", str(tmp_path / "out")]) == 0
    assert [example.id for example in load_examples(tmp_path / "out" / "examples.jsonl")] == ["a"]
    assert json.loads((tmp_path / "out/report.json").read_text())["dropped"]["duplicate"]["count"] == 1


@pytest.mark.parametrize("roles", [["user", "assistant", "assistant"], ["system", "assistant"]])
def test_a_conversation_without_a_target_is_counted(tmp_path, roles):
    path = write(tmp_path / "c.jsonl", {"messages": [{"role": role, "content": "Some words."} for role in roles]})
    drops = Drops()
    assert not list(read_examples([path], drops)) and drops.counts == {"no target": 1}


def test_a_broken_byte_costs_its_line_only(tmp_path):
    good = [json.dumps({"id": str(n), "messages": conversation(f"q{n}", "Plain.")}).encode() for n in range(3)]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([good[0], good[1].replace(b"Plain", b"Pl\xffin"), good[2]]))
    drops = Drops(skip_bad=True)
    assert [example.id for example in read_examples([path], drops)] == ["0", "2"]
    assert drops.places == {"broken text": [f"{path}:2"]}
    with pytest.raises(BadCorpus, match=r"c\.jsonl:2: broken text"):
        list(read_examples([path]))
    path.write_bytes(b"[" + b",".join([good[0], good[1].replace(b"Plain", b"Pl\xffin"), good[2]]) + b"]")
    assert [example.id for example in read_examples([path], Drops(skip_bad=True))] == ["0", "2"]


@pytest.mark.parametrize("start", ["\ufeff", " \n", "\ufeff\n  ", "\n" * 9000])
@pytest.mark.parametrize("as_array", [True, False])
def test_what_may_stand_before_the_first_record(tmp_path, start, as_array):
    record = {"id": "a", "messages": conversation("q", "Plain.")}
    path = tmp_path / "c.json"
    path.write_text(start + json.dumps([record] if as_array else record), encoding="utf-8")
    assert [example.id for example in read_examples([path])] == ["a"]


def test_broken_gzip_and_endless_nesting_are_refused(tmp_path, capsys):
    packed = bytearray(gzip.compress("".join(f"{n} words of it\n" for n in range(3000)).encode()))
    packed[60:90] = bytes(30)
    (tmp_path / "c.jsonl.gz").write_bytes(packed)
    arguments = ["--bad-lines", "skip", "--out", str(tmp_path / "out")]
    assert main(["data", str(tmp_path / "c.jsonl.gz"), *arguments]) == 2
    assert "c.jsonl.gz cannot be read to its end" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("[" * 200_000)
    assert main(["data", str(tmp_path / "c.json"), *arguments]) == 2
    assert "c.json cannot be read: record 1 nests too deeply" in capsys.readouterr().err


def test_a_missing_corpus_and_one_without_answers_are_refused(tmp_path, capsys):
    assert main(["data", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    empty = write(tmp_path / "e.jsonl", {"messages": conversation("q", " ")})
    assert main(["data", empty, "--out", str(tmp_path / "out")]) == 2
    assert "no example is left: 1 empty answer" in capsys.readouterr().err
    (tmp_path / "z.jsonl.gz").write_bytes(b"no gzip")
    assert main(["data", str(tmp_path / "z.jsonl.gz"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
