"""What the goals are measured with: looping, repeated 4-grams, steps of each request, and the command as a whole."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from medusa_apar import attach
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.eval import answering, goals, questions, weights
from medusa_apar.eval.loops import looping_share
from medusa_apar.finetune.mixture import is_held_out
from medusa_apar.heads import HydraHeads, MedusaHeads
from tests.support.folders import forking_folder
from tests.support.models import CONTROL, EOS, forking_model

# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---- looping


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1], 0.0),
        (list(range(50)), 0.0),
        ([7] * 10, 0.9),
        ([1, 2, 3] * 3, 2 / 3),
        ([1, 2, 3, 9, 1, 2, 3], 0.0),  # not directly behind each other
        ([*range(100, 120), *[1, 2, 3, 4] * 20], 76 / 100),  # a start of its own, then the loop
        ([*[1, 2, 3, 4] * 5, *range(100, 120)], 16 / 40),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], 6 / 10),  # the last copy is cut by the limit
        ([*range(10), *range(9)], 0.0),  # less than a whole second copy
    ],
)
def test_looping_share(ids, share):
    assert looping_share(ids) == pytest.approx(share)


def test_a_list_that_counts_on_while_it_says_the_same_loops():
    items = [token for number in range(10) for token in [1000 + number, *range(20)]]
    assert looping_share(items) > 0.85


def test_a_list_of_short_different_items_does_not_loop():
    items = [token for number in range(30) for token in [1, 2, 1000 + number, 2000 + number, 3]]
    assert looping_share(items) == 0.0


def test_a_doubled_sentence_in_a_long_answer_is_a_small_share():
    assert looping_share([*range(100), *range(500, 520), *range(500, 520), *range(100, 160)]) == pytest.approx(20 / 200)


@unhurried
@given(st.lists(st.integers(0, 3), max_size=60))
def test_looping_share_is_a_share_and_knows_no_names(ids):
    share = looping_share(ids)
    assert 0.0 <= share < 1.0 or not ids
    assert looping_share([token + 10 for token in ids]) == share


@unhurried
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(2, 6))
def test_a_repeated_span_covers_all_but_its_first_copy(span, copies):
    assert looping_share(span * copies) >= (copies - 1) / copies - 1e-9


# ---- steps


PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [20, 21, 22]]


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_request_in_a_batch_counts_the_steps_it_takes_alone(seed, drafting):
    model = forking_model(seed)
    heads = MedusaHeads.random(model, num_heads=3) if drafting else None
    tree = DraftTree.likeliest(12, [[0.3, 0.2, 0.1]] * 3) if drafting else None
    apar = attach(model, heads, CONTROL, draft_tree=tree, budget=13 * 4 * weights.MAX_THREADS)
    together = answering.answer(apar, PROMPTS, 40, fork=True)
    for prompt, record in zip(PROMPTS, together, strict=True):
        [alone] = answering.answer(apar, [prompt], 40, fork=True)
        output = apar.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, fork=True, return_dict_in_generate=True
        )
        assert alone["steps"] == output.stats.steps
        assert alone["ids"] == output.sequences[0, len(prompt) :].tolist()
        assert alone["thread_steps"] == sum(output.stats.accepted_lengths.values())
        assert alone["gained"] == sum(length * n for length, n in output.stats.accepted_lengths.items())
        assert record == alone
    assert len({record["steps"] for record in together}) > 1  # or a batch's own count would have done


def test_one_thread_without_heads_takes_a_step_per_token():
    apar = attach(forking_model(1), None, CONTROL, speculation="off")
    for record in answering.answer(apar, PROMPTS, 24, fork=False):
        assert record["steps"] == record["thread_steps"] == len(record["ids"]) == record["gained"]
        assert len(record["threads"]) == 1


def test_thread_records_name_their_fork():
    apar = attach(forking_model(3), None, CONTROL)
    records = answering.answer(apar, PROMPTS, 60, fork=True)
    children = [(record, thread) for record in records for thread in record["threads"][1:]]
    assert children
    for record, thread in children:
        assert record["threads"][thread["parent"]]["token_ids"][thread["fork_index"]] == CONTROL.fork_id


# ---- figures


def test_thread_ends_leaves_out_what_the_limit_cut():
    def thread(length, reason):
        return {"token_ids": [1] * length, "finish_reason": reason}

    trunk = thread(400, "stop")
    rows = [{"threads": [trunk, thread(10, "stop"), thread(20, "cancelled"), thread(300, "stop"), thread(256, "stop")]}]
    counts = {"stopped": 2, "too_long": 1, "cut": 1}
    assert goals.thread_ends(rows) == {**counts, "share": 2 / 3, "at_least": 2 / 4}
    found = {
        "speed": {},
        "forks": {},
        "loss": {},
        "repeated_4grams": {},
        "thread_ends": {"vicuna": goals.thread_ends(rows)},
    }
    assert "66.7% (at least 50.0%)" in goals.table(found)
    assert goals.thread_ends([])["at_least"] is None


def test_loss_is_that_of_the_answer_tokens():
    model = forking_model(0)
    ids, prompt_length = [5, 6, 7, 8, 9, 10, EOS], 3
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logits = logits.detach()
    expected = -sum(float(logits[place - 1, ids[place]]) for place in range(prompt_length, len(ids)))
    raw, without = answering.answer_loss(model, ids, prompt_length, [CONTROL.fork_id, CONTROL.child_id])
    assert raw == pytest.approx(expected, rel=1e-4)
    assert without < raw  # the same tokens share what the control tokens had


# ---- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model with control ids and heads in one folder, its prompts and a corpus."""
    root = tmp_path_factory.mktemp("weights")
    forking_folder(root / "model")
    loaded = AutoModelForCausalLM.from_pretrained(root / "model")
    MedusaHeads.random(loaded, num_heads=2).save_pretrained(root / "heads")
    questions = [{"question_id": 80 + n, "turns": ["what is " + "abcde"[n]]} for n in range(4)]
    (root / "vicuna.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    ids = [name for name in (f"corpus/{n}" for n in range(2000)) if is_held_out(name)][:6]
    lists = [
        "".join(f"{n}. {head}: one two three four five six seven {head}.\n" for n, head in enumerate(heads, 1))
        for heads in ("abc", "def")
    ]
    answers = ["short plain words", "other words here", "```\nx = 1\n```", "```\ny = 1\n```", *lists]
    lines = [
        {"id": id, "messages": [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": text}]}
        for id, text in zip(ids, answers, strict=True)
    ]
    (root / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(root=root, model=root / "model", heads=root / "heads")


def arguments(folders, out, *more):
    files = ["--prompts", f"vicuna={folders.root / 'vicuna.jsonl'}", "--corpus", str(folders.root / "corpus.jsonl")]
    sizes = ["--dtype", "float32", "--batch", "3", "--max-new-tokens", "24", "--nodes", "8"]
    model = ["--model", str(folders.model), "--base", str(folders.model), "--heads", str(folders.heads)]
    return [*model, *files, *sizes, "--out", str(out), *more]


def test_the_command_measures_all_and_resumes_to_the_same(folders, tmp_path, capsys):
    assert weights.main(arguments(folders, tmp_path / "whole")) == 0
    shown = capsys.readouterr().out
    for measure in ("threads only", "heads only", "both", "loss on plain", "4-grams", "that fork, structured"):
        assert measure in shown
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["loss"]["change"] == pytest.approx(0.0)  # both are the same weights here
    assert report["speed"]["base"]["vicuna"]["all"]["tokens_per_step"] == 1.0
    assert report["forks"]["structured"]["prompts"] == report["forks"]["plain: code"]["prompts"] == 2
    assert report["forks"]["code_or_plain"]["prompts"] == 4

    out = tmp_path / "cut"
    out.mkdir()
    for name in ("settings.json", "runs.jsonl"):
        text = (tmp_path / "whole" / name).read_text()
        (out / name).write_text(text if name == "settings.json" else text[: len(text) // 2])  # killed in mid-line
    assert weights.main(arguments(folders, out)) == 0
    resumed = json.loads((out / "report.json").read_text())
    for part in ("speed", "forks", "loss", "thread_ends", "repeated_4grams"):
        assert resumed[part] == report[part]
    assert len((out / "runs.jsonl").read_text().splitlines()) == len(
        (tmp_path / "whole" / "runs.jsonl").read_text().splitlines()
    )


def test_heads_replayed_are_heads_decoded(folders, tmp_path):
    for name, more in (("replayed", []), ("decoded", ["--decode"])):
        assert weights.main(arguments(folders, tmp_path / name, *more)) == 0
    replayed, decoded = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("replayed", "decoded"))
    assert decoded["both_equal_threads"] == 1.0  # float32
    for system in ("heads medusa", "both medusa"):
        # Not mean_forks: how many threads were forked behind the limit depends on when the answer is done.
        for key in ("answers", "mean_tokens", "tokens_per_step", "tokens_per_step_pooled"):
            assert replayed["speed"][system]["vicuna"]["all"][key] == decoded["speed"][system]["vicuna"]["all"][key]
    speeds = [decoded["speed"][name]["vicuna"]["all"]["tokens_per_step"] for name in ("both medusa", "threads")]
    assert speeds[0] > speeds[1]  # or the heads were never right


def test_heads_of_two_kinds_are_measured_in_one_run(folders, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folders.model)
    HydraHeads.random(model, num_heads=2).save_pretrained(tmp_path / "hydra")
    asked = ["--systems", "heads", "--heads", str(folders.heads)]
    assert weights.main(arguments(folders, tmp_path / "out", *asked, str(tmp_path / "hydra"))) == 0
    speed = json.loads((tmp_path / "out/report.json").read_text())["speed"]
    assert set(speed) == {"single", "heads medusa", "heads hydra"}
    assert weights.main(arguments(folders, tmp_path / "two", *asked, str(folders.heads))) == 2
    assert "two of a kind (medusa, medusa)" in capsys.readouterr().err


def test_answers_serve_new_heads_but_steps_are_not_mixed(folders, tmp_path, capsys):
    """Answers cost hours, and heads change none of them."""
    out = tmp_path / "out"
    assert weights.main(arguments(folders, out, "--systems", "heads")) == 0
    answered = (out / "runs.jsonl").read_text().splitlines()
    model = AutoModelForCausalLM.from_pretrained(folders.model)
    MedusaHeads.random(model, num_heads=2, seed=1).save_pretrained(tmp_path / "new")
    for more in (["--heads", str(tmp_path / "new")], ["--nodes", "9"], ["--decode"]):
        assert weights.main(arguments(folders, out, "--systems", "heads", *more)) == 2
        assert "holds steps of heads medusa with heads" in capsys.readouterr().err
    config = json.loads((folders.heads / "config.json").read_text())
    shutil.copytree(folders.heads, tmp_path / "calibrated")
    (tmp_path / "calibrated/config.json").write_text(json.dumps(config | {"acceptance": [[0.2, 0.19], [0.9, 0.01]]}))
    assert weights.main(arguments(folders, out, "--systems", "heads", "--heads", str(tmp_path / "calibrated"))) == 2
    assert "holds steps of heads medusa with heads" in capsys.readouterr().err
    HydraHeads.random(model, num_heads=2).save_pretrained(tmp_path / "hydra")
    assert weights.main(arguments(folders, out, "--systems", "heads", "--heads", str(tmp_path / "hydra"))) == 0
    rows = (out / "runs.jsonl").read_text().splitlines()
    assert rows[: len(answered)] == answered and len(rows) == len(answered) + 4  # the four questions, replayed


def test_bad_input_is_one_sentence_before_any_work(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert weights.main(arguments(folders, out, "--limit", "1", "--systems", "threads")) == 0
    capsys.readouterr()
    assert weights.main(arguments(folders, out, "--max-new-tokens", "25")) == 2
    assert "another max_new_tokens" in capsys.readouterr().err
    assert weights.main(arguments(folders, tmp_path / "few", "--candidates", "7")) == 2
    assert "--candidates 7 must be --nodes 8 at least" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"turns": ["a"]}\n{"turn": 1}\n')
    assert weights.main([*arguments(folders, tmp_path / "new"), "--prompts", f"mt={bad}"]) == 2
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        weights.main([*arguments(folders, tmp_path / "new"), "--prompts", "no-such-file"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"q\.jsonl:2: broken JSON"),
        (b"\xff", r"q\.jsonl:2: broken text"),
        (b"[" * 100_000, r"q\.jsonl:2: broken JSON, it nests too deeply"),
        (b"5", r"q\.jsonl:2 is no question with `turns`"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"turns": ["Why?"]}\n' + content + b"\n")
    with pytest.raises(ValueError, match=words):
        questions.read_questions("q", path)


def test_damaged_settings_are_named(tmp_path):
    for name in ("settings.json", "runs.jsonl"):
        (tmp_path / name).write_text("{")
    (tmp_path / "model").mkdir()
    args = SimpleNamespace(model=str(forking_folder(tmp_path / "model")), base=None, dtype="float32", max_new_tokens=4)
    args.out = tmp_path
    with pytest.raises(ValueError, match=r"settings\.json is not valid JSON"):
        weights.check_same_settings(args)
