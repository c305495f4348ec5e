"""Judging: what is asked is FastChat's, what is not understood is counted, and a judge that fails costs no verdict."""

import hashlib
import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from medusa_apar.commands.cli import main
from medusa_apar.eval import bench, chat_endpoint, judge, judge_files, prompts
from medusa_apar.eval.prompts import Prompt
from medusa_apar.eval.runs import Runs
from medusa_apar.job import Job
from tests.support.folders import forking_folder

TEMPLATES = [
    {"name": "single-v1", "system_prompt": "S", "prompt_template": "rate {question} | {answer}"},
    {"name": "single-math-v1", "system_prompt": "S", "prompt_template": "rate {question} | {answer} | {ref_answer_1}"},
    {"name": "pair-v2", "system_prompt": "P", "prompt_template": "pair {question} | {answer_a} | {answer_b}"},
    {
        "name": "pair-math-v1",
        "system_prompt": "P",
        "prompt_template": "{ref_answer_1} {question} {answer_a} {answer_b}",
    },
]
ASKED = [Prompt("101", "math", "sum?"), Prompt("102", "chat", "hi?"), Prompt("x", "", "why {so}?")]
REFERENCE = {"question_id": 101, "choices": [{"index": 0, "turns": ["four"]}]}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Templates of our own, and one reference, in place of FastChat's."""
    for name, rows in (("JUDGE_PROMPTS", TEMPLATES), ("REFERENCES", [REFERENCE])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(
            prompts, name, prompts.PromptSet(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "")
        )
    monkeypatch.setenv("MEDUSA_APAR_DATA", str(tmp_path))


def answered(tmp_path, **texts):
    """A job whose systems have answered ASKED with these texts."""
    job = Job(tmp_path / "out", "bench", {})
    results = Runs(job.folder / "results.jsonl", ("system", "prompt", "repeat"))
    results.add(
        [
            {"system": name, "prompt": prompt.id, "repeat": 0, "text": f"{text} {prompt.id}"}
            for name, text in texts.items()
            for prompt in ASKED
        ]
    )
    (job.folder / bench.SUMMARY).write_text('{"systems": 2}')
    (job.folder / bench.TABLE).write_text("speeds\n")
    return job, results


def have_judged(player, job, results, against=None, names=("a", "b")):
    with job:
        return judge.run(job, judge.Judge(player.url, None, "mt"), results, ASKED, names, against)


# ---- ratings and pairs


def test_every_answer_is_rated_with_a_reference_where_there_is_one(player, data, tmp_path):
    player.play = lambda messages: "Rating: [[9]]" if "good" in messages[-1]["content"] else "Rating: [[2.5]]"
    found = have_judged(player, *answered(tmp_path, a="good", b="bad"))
    assert found["systems"]["a"]["rating"] == {"value": 9.0, "low": 9.0, "high": 9.0}
    assert found["systems"]["b"]["rating"]["value"] == 2.5
    assert found["systems"]["b"]["categories"]["math"]["value"] == 2.5
    assert player.asked == [
        *("rate sum? | good 101 | four", "rate sum? | bad 101 | four", "rate hi? | good 102", "rate hi? | bad 102"),
        *("rate why {so}? | good x", "rate why {so}? | bad x"),
    ]
    body = player.requests[-1][2]
    assert body["model"] == "judge-1" and body["temperature"] == 0 and body["messages"][0]["content"] == "S"
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text()) == {"systems": 2, "judge": found}
    table = (out / "table.md").read_text()
    assert table.startswith("speeds\n\n**judged** by judge-1") and "| a | 9.00 (9.00 to 9.00) | 0 |" in table


@pytest.mark.parametrize(
    ("marks", "ended"),
    [
        (("[[A]]", "[[B]]"), "win"),
        (("[[B]]", "[[A]]"), "loss"),
        (("[[A]]", "[[A]]"), "tie"),  # it likes the first place
        (("[[C]]", "[[B]]"), "tie"),
        (("[[C]]", "[[C]]"), "tie"),
        (("[[A]]", "neither"), "unreadable"),
    ],
)
def test_a_win_is_a_win_in_both_orders(player, data, tmp_path, marks, ended):
    def play(messages):
        text = messages[-1]["content"]
        return "[[5]]" if text.startswith("rate") else marks[text.index("ours") > text.index("theirs")]

    player.play = play
    found = have_judged(player, *answered(tmp_path, base="theirs", b="ours"), "base", ("base", "b"))
    games = found["systems"]["b"]["games"]
    assert games[ended] == 3 == sum(games[how] for how in ("win", "tie", "loss", "unreadable"))
    assert "four sum? ours 101 theirs 101" in player.asked and "pair hi? | theirs 102 | ours 102" in player.asked
    assert "games" not in found["systems"]["base"]
    assert games["points"] is None if ended == "unreadable" else games["points"]["value"] == judge.POINTS[ended]
    assert "pairs against base" in (tmp_path / "out/table.md").read_text()


def test_what_cannot_be_read_is_counted_and_left_out_for_all(player, data, tmp_path):
    """Else the means of two systems would be about different prompts."""
    player.play = lambda messages: {"bad 102": "no idea", "good 102": "[[1]]"}.get(
        messages[-1]["content"].split(" | ")[1], "[[8]]"
    )
    found = have_judged(player, *answered(tmp_path, a="good", b="bad"))
    assert found["rated"] == 2 and found["prompts"] == 3
    assert found["systems"]["b"]["unreadable"] == 1 and found["systems"]["a"]["unreadable"] == 0
    assert found["systems"]["a"]["rating"]["value"] == 8.0  # its 1 for prompt 102 has no counterpart


def test_a_judge_that_cannot_be_read_at_all_has_no_rating(player, data, tmp_path):
    player.play = lambda messages: None
    found = have_judged(player, *answered(tmp_path, a="good", b="bad"), "a")
    assert found["rated"] == 0 and found["systems"]["a"] == {"rating": None, "categories": {}, "unreadable": 3}
    assert "| b | - | 3 | 0 | 0 | 0 | - | 3 |" in (tmp_path / "out/table.md").read_text()


def test_the_same_answer_is_judged_once(player, data, tmp_path):
    found = have_judged(player, *answered(tmp_path, a="good", b="good"), "a")
    assert len(player.asked) == 3 and found["systems"]["b"]["games"]["tie"] == 3


# ---- a judge that fails


def test_a_killed_judge_goes_on_and_a_changed_answer_is_judged_anew(player, data, tmp_path):
    whole = have_judged(player, *answered(tmp_path, a="good", b="bad"))
    said = tmp_path / "out/judge/said.jsonl"
    text = said.read_text()
    said.write_text(text[: len(text) // 2])
    kept = said.read_text().count("\n")
    player.requests.clear()
    job, results = answered(tmp_path, a="good", b="bad")
    assert have_judged(player, job, results) == whole
    assert len(player.asked) == 6 - kept and said.read_text().count("\n") == 6
    player.requests.clear()
    assert have_judged(player, job, results) == whole and player.asked == []
    results.add([results.rows["b", "x", 0] | {"text": "another"}])
    have_judged(player, job, results)
    assert player.asked == ["rate why {so}? | another"]


def test_a_busy_judge_is_asked_again(player, data, tmp_path, slept):
    replies = [(429, {}, {"Retry-After": "7"}), (503, {}), (500, {}, {"Retry-After": "soon"}), "[[4]]"]
    player.play = lambda messages: replies.pop(0) if replies else "[[5]]"
    found = have_judged(player, *answered(tmp_path, a="good", b="bad"))
    assert slept == [7, 2, 4] and found["systems"]["a"]["rating"]["value"] == pytest.approx(14 / 3)


def test_a_judge_that_is_too_slow_is_asked_again_and_given_up_at_last(player, data, tmp_path, slept, monkeypatch):
    let_go = threading.Event()
    player.play = lambda messages: let_go.wait(20) and "[[5]]"
    monkeypatch.setattr(chat_endpoint, "TIMEOUT", 0.05)
    with pytest.raises(
        ConnectionError, match=r"failed 7 times, at last with timed out after 0.05 seconds; what it has judged is kept"
    ):
        have_judged(player, *answered(tmp_path, a="good", b="bad"))
    let_go.set()
    assert slept == list(chat_endpoint.WAITS)


# ---- FastChat


@pytest.fixture
def fastchat(monkeypatch):
    """Its llm_judge, without the two API clients that it imports and these tests do not use."""
    pytest.importorskip("fastchat")
    for name in ("openai", "anthropic"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    from fastchat.llm_judge import common, gen_judgment

    return SimpleNamespace(common=common, gen_judgment=gen_judgment)


def test_the_files_are_fastchats(fastchat, data, tmp_path):
    job, results = answered(tmp_path, a="good", b="bad")
    judge_files.write(job, results, ASKED, ["a", "b"], "mt")
    folder, common = job.folder / "judge", fastchat.common
    questions = common.load_questions(str(folder / "question.jsonl"), None, None)
    assert questions[0] == {"question_id": 101, "category": "math", "turns": ["sum?"]}
    assert questions[2]["question_id"] == "x"
    answers = common.load_model_answers(str(folder / "model_answer"))
    assert set(common.get_model_list(str(folder / "model_answer"))) == {"a", "b"} == set(answers)
    known = common.load_model_answers(str(folder / "reference_answer"))
    judges = fastchat.gen_judgment.make_judge_single("gpt-4", {row["name"]: row for row in MULTI_TURN})
    common.check_data(questions, answers, known, ["a", "b"], judges)
    assert list(answers["a"][101]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert answers["b"]["x"]["choices"] == [{"index": 0, "turns": ["bad x"]}]
    before = (folder / "model_answer/a.jsonl").read_bytes()
    judge_files.write(job, results, ASKED, ["a", "b"], "mt")
    assert (folder / "model_answer/a.jsonl").read_bytes() == before


MULTI_TURN = TEMPLATES + [row | {"name": f"{row['name']}-multi-turn"} for row in TEMPLATES]


@pytest.mark.parametrize("name", ["JUDGE_PROMPTS", "REFERENCES"])
def test_a_broken_line_of_fastchats_files_is_named(player, data, tmp_path, monkeypatch, name):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(path.read_text() + "{\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(prompts, name, prompts.PromptSet(path.name, digest, ""))
    line = path.read_text().count("\n")
    with pytest.raises(ValueError, match=rf"{path}:{line}: broken JSON"):
        judge.Judge(player.url, None, "mt")


def test_no_reference_is_borrowed_by_a_set_with_the_same_ids(data, tmp_path):
    job, results = answered(tmp_path, a="good")
    judge_files.write(job, results, ASKED, ["a"], "mine.jsonl")
    assert sorted(path.name for path in (job.folder / "judge").iterdir()) == ["model_answer", "question.jsonl"]


def test_what_is_asked_is_what_fastchat_asks(fastchat, player, data, tmp_path, monkeypatch):
    """System prompt, question, answers and reference, in its places."""
    common, theirs = fastchat.common, []
    monkeypatch.setattr(common, "chat_completion_openai", lambda _, conv, **more: theirs.append(conv) or "[[A]]")
    have_judged(player, *answered(tmp_path, a="good", b="bad"), "a")
    good, bad = ({"choices": [{"turns": [f"{text} 101"]}]} for text in ("good", "bad"))
    question = {"turns": [ASKED[0].text]}
    rate, pair = (
        common.Judge("gpt-4", TEMPLATES[n] | {"output_format": f}) for n, f in ((1, "[[rating]]"), (3, "[[A]]"))
    )
    common.run_judge_single(question, good, rate, REFERENCE)
    common.run_judge_pair(question, bad, good, pair, REFERENCE)
    ours = [body["messages"] for _, _, body in player.requests if body]
    assert all(conv.to_openai_api_messages() in ours for conv in theirs) and len(theirs) == 2


@pytest.mark.parametrize(
    "text",
    ["Rating: [[7]]", "[[7.5]] or [[3]]", "[6]", "[ref] [2] then [[8]]", "[[10]]", "[[9.]]", "seven", "[[-1]]", ""],
)
def test_ratings_are_read_as_fastchat_reads_them(fastchat, monkeypatch, text):
    monkeypatch.setattr(fastchat.common, "chat_completion_openai", lambda *args, **more: text)
    template = {"prompt_template": "{question}{answer}", "system_prompt": "", "output_format": "[[rating]]"}
    answer = {"choices": [{"turns": ["a"]}]}
    judges = fastchat.common.Judge("gpt-4", template)
    score, *_ = fastchat.common.run_judge_single({"turns": ["q"]}, answer, judges, None)
    assert judge.rating(text) == (None if score == -1 else score)


@pytest.mark.parametrize("text", ["[[A]]", "[[B]]", "[[C]]", "not [[B]] but [[A]]", "[[C]], or [[B]]", "[A]", ""])
def test_verdicts_are_read_as_fastchat_reads_them(fastchat, monkeypatch, text):
    monkeypatch.setattr(fastchat.common, "chat_completion_openai", lambda *args, **more: text)
    template = {"prompt_template": "{question}{answer_a}{answer_b}", "system_prompt": "", "output_format": "[[A]]"}
    answer = {"choices": [{"turns": ["a"]}]}
    judges = fastchat.common.Judge("gpt-4", template)
    winner, *_ = fastchat.common.run_judge_pair({"turns": ["q"]}, answer, answer, judges, None)
    assert judge.verdict(text) == (None if winner == "error" else winner)


# ---- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("judge")
    forking_folder(root / "model")
    (root / "p.jsonl").write_text('{"id": 1, "prompt": "ask a"}\n{"id": 2, "prompt": "ask b"}\n')
    return root


def command(model, out, *more):
    options = ["--heads", "none", "--systems", "hf", "threads", "--max-new-tokens", "12", "--out", str(out)]
    return main(["bench", "--model", str(model / "model"), "--prompts", str(model / "p.jsonl"), *options, *more])


def test_the_command_judges_what_it_timed(model, player, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(model, out) == 0
    assert (out / "judge/model_answer/threads.jsonl").exists() and player.requests == []
    assert command(model, out, "--judge", player.url, "--judge-model", "me", "--judge-against", "hf") == 0
    assert "**all** (2 prompts)" in (shown := capsys.readouterr().out) and "**judged** by me" in shown
    assert json.loads((out / "summary.json").read_text())["judge"]["systems"]["threads"]["rating"]["value"] == 5.0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--judge", "http://127.0.0.1:9/v1"], "nobody answers at http://127.0.0.1:9/v1"),
        (["--judge", "localhost:8000"], "localhost:8000 is no address of a judge"),
        (["--judge-model", "m"], "need --judge"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-against", "ours"], "--judge-against ours is none of --systems"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_said_before_anything_is_timed(
    model, tmp_path, capsys, monkeypatch, more, says
):
    monkeypatch.setenv("no_proxy", "*")
    assert command(model, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", ["[[10000000000]]", "[[0]]", "[[10.5]]", "[[-3]]", "[[nan]]", "[[1e3]]", "[[" + "9" * 400 + "]]"]
)
def test_a_rating_that_is_not_on_the_scale_is_none(player, data, tmp_path, given):
    """One of them would be the mean of all others."""
    player.play = lambda messages: given if "bad 102" in messages[-1]["content"] else "Rating: [[9]]"
    found = have_judged(player, *answered(tmp_path, a="good", b="bad"))
    assert judge.rating(given) is None
    assert found["rated"] == 2 and found["systems"]["b"]["unreadable"] == 1
    assert found["systems"]["b"]["rating"] == {"value": 9.0, "low": 9.0, "high": 9.0}


@pytest.mark.parametrize("line", ["{", "5", "{}", '{"judge": "judge-1"}', '{"judge": [], "asked": {}}', "[" * 100_000])
def test_what_is_no_verdict_of_ours_is_named(player, data, tmp_path, line):
    job, results = answered(tmp_path, a="good")
    have_judged(player, job, results, names=("a",))
    said = tmp_path / "out/judge/said.jsonl"
    said.write_text(f"{said.read_text()}{line}\n")
    with pytest.raises(ValueError, match=r"said\.jsonl:4 is no line of such results: "):
        have_judged(player, job, results, names=("a",))
