"""Calibration against brute-force counts, on random ranks and on a tiny model's own answers."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from medusa_apar.attaching import attach
from medusa_apar.commands.cli import main
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.heads import MedusaHeads, calibrate
from medusa_apar.heads.answers import AnswerFile, encode, greedy
from medusa_apar.heads.ask import as_record
from medusa_apar.heads.calibrate import UNKNOWN, Ranks, Reliability, acceptance, accepted
from medusa_apar.heads.calibration_plot import plot
from tests.support.folders import own_code
from tests.support.models import CONTROL, EOS, forking_model
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer

TOP_K, HEADS = 4, 3
# A busy machine is no failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def random_ranks(seed: int, threads: int = 30, top_k: int = TOP_K, heads: int = HEADS) -> Ranks:
    """Correlated ranks of threads of 1 to 30 positions; head h knows nothing of a thread's last h + 1 positions."""
    rng = np.random.default_rng(seed)
    rows, owners = [], []
    for thread in range(threads):
        length = int(rng.integers(1, 31))
        easy = rng.random(length) < 0.5
        part = np.where(easy[:, None], rng.integers(0, 2, (length, heads)), rng.integers(0, top_k + 1, (length, heads)))
        for head in range(heads):
            part[max(0, length - head - 1) :, head] = UNKNOWN
        rows.append(part)
        owners += [thread] * length
    owner = np.array(owners)
    return Ranks(np.concatenate(rows), owner, owner // 3, top_k)


@pytest.mark.parametrize("conditional", [True, False])
def test_acceptance_equals_a_count_by_hand(conditional):
    ranks = random_ranks(0)
    table, counts = acceptance(ranks, conditional)
    for head, rank in itertools.product(range(HEADS), range(TOP_K)):
        right = total = 0
        for row in ranks.ranks.tolist():
            if row[head] == UNKNOWN or (conditional and any(before >= TOP_K for before in row[:head])):
                continue
            total += 1
            right += row[head] == rank
        assert counts[head] == total
        assert table[head][rank] == pytest.approx(right / total)


def brute_accepted(row, choices):
    """Nodes of the longest path of the tree that the ranks begin with."""
    return max((len(choice) for choice in choices if tuple(row[: len(choice)]) == tuple(choice)), default=0)


@unhurried
@given(seed=st.integers(0, 1000), size=st.integers(1, 24))
def test_accepted_nodes_equal_a_walk_and_never_exceed_the_depth(seed, size):
    ranks = random_ranks(seed, threads=5)
    for tree in (DraftTree.likeliest(size, acceptance_or_even(ranks)), calibrate.joint_tree(ranks, size)):
        if not len(tree):
            continue
        found = accepted(ranks, tree)
        assert (found <= tree.num_heads).all()
        assert (np.diff(found, axis=1) >= 0).all()
        for nodes in range(1, len(tree) + 1):
            expected = [brute_accepted(row, tree.choices[:nodes]) for row in ranks.ranks.tolist()]
            assert found[:, nodes - 1].tolist() == expected
        for tokens in (calibrate.measured_tokens, calibrate.simulated_tokens):
            if (ranks.ranks[:, -1] != UNKNOWN).any():
                values = tokens(ranks, tree)
                assert all(1 <= value <= 1 + tree.num_heads for value in values)


def acceptance_or_even(ranks):
    return calibrate.positive(acceptance(ranks)[0])


@unhurried
@given(seed=st.integers(0, 1000))
def test_tokens_grow_with_every_node(seed):
    ranks = random_ranks(seed)
    table = acceptance_or_even(ranks)
    tree = DraftTree.likeliest(30, table)
    for values in (calibrate.expected_tokens(tree, table), calibrate.measured_tokens(ranks, tree)):
        assert values == sorted(values)
        assert values[0] >= 1


def test_the_simulation_walks_like_a_decoder():
    ranks = random_ranks(3)
    tree = calibrate.joint_tree(ranks, 12)
    tokens = steps = 0
    for thread in np.unique(ranks.threads):
        rows = ranks.ranks[ranks.threads == thread].tolist()
        place = 0
        while place < len(rows) - 1:
            gain = 1 + brute_accepted(rows[place], tree.choices)
            steps, place = steps + 1, place + gain
        tokens += len(rows) - 1
        assert place in (len(rows) - 1, len(rows))  # there is no token behind an accepted end token
    assert calibrate.simulated_tokens(ranks, tree)[-1] == pytest.approx(tokens / steps)


def test_the_joint_tree_is_the_best_where_all_positions_are_whole():
    ranks = random_ranks(5, threads=60)
    ranks = ranks.of(ranks.ranks[:, -1] != UNKNOWN)
    for size in (1, 3, 8, 20):
        best = calibrate.measured_tokens(ranks, calibrate.joint_tree(ranks, size))[-1]
        other = calibrate.measured_tokens(ranks, DraftTree.likeliest(size, acceptance_or_even(ranks)))[-1]
        assert best >= other - 1e-9
    paths = count_paths(ranks)
    top = sorted(paths.values(), reverse=True)[:8]
    assert sorted((paths[path] for path in calibrate.joint_tree(ranks, 8).choices), reverse=True) == top


def count_paths(ranks):
    counts = {}
    for row in ranks.ranks.tolist():
        for depth in range(HEADS):
            if row[depth] >= TOP_K:
                break
            path = tuple(row[: depth + 1])
            counts[path] = counts.get(path, 0) + 1
    return counts


def test_reliability_counts_every_guess_once():
    rng = np.random.default_rng(0)
    ranks = random_ranks(1)
    log_probs = np.log(rng.dirichlet(np.ones(TOP_K + 2), (len(ranks), HEADS))[..., :TOP_K])
    found = Reliability.empty(HEADS)
    for part in (slice(0, 70), slice(70, None)):
        found.add(log_probs[part], ranks.ranks[part])
    _, counts = acceptance(ranks)
    for head in range(HEADS):
        assert found.count[head].sum() == TOP_K * counts[head]
        rows = found.rows(head)
        assert all(row["from"] <= row["claimed"] <= row["to"] + 1e-9 for row in rows)
        assert sum(row["right"] * row["count"] for row in rows) == pytest.approx(found.right[head].sum())
    sure = Reliability.empty(1)
    sure.add(np.zeros((10, 1, 1)), np.zeros((10, 1), dtype=int))
    assert sure.errors() == [0.0]
    assert sure.rows(0) == [{"from": 2**-0.5, "to": 1.0, "claimed": 1.0, "right": 1.0, "count": 10}]


def test_halves_are_whole_answers():
    one, other = random_ranks(2).halves()
    assert not set(one.records) & set(other.records)
    assert len(one) + len(other) == len(random_ranks(2))
    lone = Ranks(one.ranks, one.threads, np.zeros_like(one.records), TOP_K)
    assert lone.halves()[0] is lone.halves()[1] is lone


def test_a_half_without_whole_positions_makes_no_figure_of_nothing():
    ranks = random_ranks(2)
    ranks.ranks[ranks.records % 2 == 1, -1] = UNKNOWN  # one half's answers are all too short for the last head
    reliability = Reliability.empty(HEADS)
    reliability.add(np.log(np.full((len(ranks), HEADS, TOP_K), 0.2)), ranks.ranks)
    found = calibrate.report(ranks, reliability, 8)
    json.dumps(found, allow_nan=False)
    assert found["tokens"]["measured"][-1] >= 1


def test_no_chance_is_zero_where_a_tree_divides_by_it():
    table = calibrate.positive([[0.5, 0.0, 0.0], [0.0, 0.2, 0.0]])
    assert len(DraftTree.likeliest(12, table)) == 12
    assert min(map(min, table)) > 0


# ---- on a model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model with control ids, heads in a folder of their own, and answers the model wrote."""
    root = tmp_path_factory.mktemp("calibrate")
    model = forking_model(3)
    plain = torch.nn.Linear(32, 61, bias=False)  # a Llama folder has no bias to keep
    plain.weight.data = model.get_output_embeddings().weight.data
    model.set_output_embeddings(plain)
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "model" / "apar_config.json").write_text(json.dumps({"fork_token_id": 3, "child_token_id": 4}))
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    MedusaHeads.random(model, num_heads=3).save_pretrained(root / "heads")
    (root / "chats.jsonl").write_text(
        "".join(
            json.dumps(
                {"id": n, "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": t}]}
            )
            + "\n"
            for n, t in (("a", "one"), ("b", "two"), ("c", "three"), ("d", "four"))
        )
    )
    return root


def loaded(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "model").eval()
    return model, MedusaHeads.from_pretrained(folders / "heads", model)


def own_answers(model):
    output = attach(model, None, CONTROL, speculation="off").generate(
        **prompts(4, 5), max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    return [as_record(str(row), tree) for row, tree in enumerate(output.paragraph_tree)]


def test_ranks_are_those_of_the_guesses_position_by_position(folders):
    model, heads = loaded(folders)
    file = AnswerFile(own_answers(model))
    ranks, reliability, own = calibrate.measure(model, heads, file, [EOS], TOP_K)
    assert own > 0.9  # ties in half precision aside
    place = 0
    for record in range(len(file.records)):
        answers = encode(model, file, record, [EOS])
        chosen = greedy(model, file, answers)
        for at in range(len(answers)):
            expected = [UNKNOWN] * heads.num_heads
            ids, _ = heads.guess(answers.hidden[at : at + 1], torch.zeros(1, heads.num_heads, dtype=torch.long), TOP_K)
            for head in range(heads.num_heads):
                ahead = at + 1 + head
                if ahead >= len(answers) or answers.threads[ahead] != answers.threads[at]:
                    break
                if answers.next_ids[at + head] != chosen[at + head]:
                    break
                guesses = ids[0, head].tolist()
                true = int(chosen[ahead])
                expected[head] = guesses.index(true) if true in guesses else TOP_K
            assert ranks.ranks[place].tolist() == expected
            assert ranks.records[place] == record
            place += 1
    assert place == len(ranks)
    assert reliability.count[0].sum() == TOP_K * (ranks.ranks[:, 0] != UNKNOWN).sum()


def test_foreign_answers_count_only_where_the_base_would_have_written_them(folders):
    model, heads = loaded(folders)
    record = {"prompt_ids": [5, 6, 7], "threads": [{"parent": -1, "fork_index": -1, "token_ids": list(range(8, 40))}]}
    file = AnswerFile([record])
    answers = encode(model, file, 0, [EOS])
    chosen = greedy(model, file, answers)
    drafted, truth = calibrate.paths(answers, chosen, heads.num_heads)
    for at in range(len(answers)):
        for head in range(heads.num_heads):
            written = list(range(8, 40))[at : at + head + 1]
            right = written == chosen[at : at + head + 1].tolist() and at + 1 + head < len(answers)
            assert truth[at, head] == (chosen[at + 1 + head] if right else UNKNOWN)
            if at + head < len(answers) - 1:
                assert drafted[at, head] == 8 + at + head


def test_the_command_writes_what_attach_reads_and_resumes(folders, tmp_path, capsys):
    arguments = ["calibrate", "--model", str(folders / "model"), "--heads", str(folders / "heads")]
    arguments += ["--prompts", str(folders / "chats.jsonl"), "--max-new-tokens", "40", "--batch", "2", "--nodes", "12"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--write"]) == 0
    assert "step by step" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert len(report["tokens"]["expected"]) == 12
    model, heads = loaded(folders)
    assert heads.acceptance == report["acceptance"]
    assert len(heads.acceptance) == 3 and len(heads.acceptance[0]) == 10
    attach(model, heads, CONTROL).generate(**prompts(1, 4), max_new_tokens=8, do_sample=False)

    whole = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(whole[: len(whole) // 2])  # killed in mid-line
    assert main([*arguments, "--out", str(out)]) == 0
    again = json.loads((out / "report.json").read_text())
    assert again["acceptance"] == report["acceptance"]
    assert main([*arguments, "--out", str(out), "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
    given = [*arguments[:5], "--answers", str(out / "answers.jsonl"), "--nodes", "12", "--out", str(tmp_path / "two")]
    assert main(given) == 0
    assert json.loads((tmp_path / "two" / "report.json").read_text())["acceptance"] == report["acceptance"]


def test_bad_input_is_one_sentence_before_any_work(folders, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt_ids": [1], "threads": [{"token_ids": [2]}]}\n{"threads": []}\n')
    arguments = ["calibrate", "--model", str(folders / "model"), "--out", str(tmp_path / "out")]
    heads = ["--heads", str(folders / "heads")]
    for more, said in (
        ([*heads, "--answers", str(bad)], "bad.jsonl:2"),
        ([*heads, "--prompts", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--prompts", str(folders / "chats.jsonl")], "comes with no heads"),
        (["--heads", "nowhere", "--prompts", str(folders / "chats.jsonl")], "nowhere does not exist"),
    ):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def record(name, ids):
    return {"id": name, "prompt_ids": [5, 6], "threads": [{"parent": -1, "fork_index": -1, "token_ids": ids}]}


def write_answers(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_answers_that_loop_are_left_out_and_counted(folders, tmp_path, capsys):
    model, _ = loaded(folders)
    sound = own_answers(model)
    looping = [record("x", [7, 8] * 20), record("y", [9] * 30)]
    command = ["calibrate", "--model", str(folders / "model"), "--heads", str(folders / "heads"), "--nodes", "8"]
    reports = {}
    for name, records in (("sound", sound), ("all", sound + looping)):
        path = write_answers(tmp_path / f"{name}.jsonl", records)
        assert main([*command, "--answers", path, "--out", str(tmp_path / name)]) == 0
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
    own = reports["sound"]["looping"]
    assert own and f"{own + 2} more loop" in capsys.readouterr().err
    assert reports["all"]["looping"] == own + 2
    assert reports["all"]["acceptance_positions"] == reports["sound"]["acceptance_positions"]
    path = write_answers(tmp_path / "looping.jsonl", looping)
    assert main([*command, "--answers", path, "--out", str(tmp_path / "out")]) == 2
    assert "every answer loops" in capsys.readouterr().err


def test_acceptance_goes_beside_the_heads_of_a_model_folder(folders, tmp_path):
    model, _ = loaded(folders)
    whole = tmp_path / "model"
    shutil.copytree(folders / "model", whole)
    shutil.copytree(folders / "heads", whole / "medusa")
    before = (whole / "config.json").read_bytes()
    path = write_answers(tmp_path / "a.jsonl", own_answers(model))
    command = ["calibrate", "--model", str(whole), "--heads", str(whole), "--answers", path, "--nodes", "8"]
    assert main([*command, "--out", str(tmp_path / "out"), "--write"]) == 0
    assert (whole / "config.json").read_bytes() == before
    found = json.loads((tmp_path / "out" / "report.json").read_text())["acceptance"]
    assert MedusaHeads.from_pretrained(whole, model).acceptance == found


def test_the_depth_limit_of_the_model_holds(folders, tmp_path):
    model, _ = loaded(folders)
    shutil.copytree(folders / "model", tmp_path / "model")
    control = {"fork_token_id": 3, "child_token_id": 4, "max_depth": 1}
    (tmp_path / "model" / "apar_config.json").write_text(json.dumps(control))
    output = attach(model, None, CONTROL, max_depth=1).generate(
        **prompts(4, 5), max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    records = [as_record(str(row), tree) for row, tree in enumerate(output.paragraph_tree)]
    command = ["calibrate", "--model", str(tmp_path / "model"), "--heads", str(folders / "heads"), "--nodes", "8"]
    path = write_answers(tmp_path / "a.jsonl", records)
    assert main([*command, "--answers", path, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["own_tokens"] > 0.99  # children would fork again if they might


def test_ids_beyond_the_vocabulary_and_other_models_are_refused(folders, tmp_path, capsys):
    arguments = ["calibrate", "--model", str(folders / "model"), "--heads", str(folders / "heads"), "--nodes", "8"]
    path = write_answers(tmp_path / "a.jsonl", [record("x", [7, 8, 9, 61])])
    assert main([*arguments, "--answers", path, "--out", str(tmp_path / "out")]) == 2
    assert "a.jsonl:1: id 61 is beyond the model's vocabulary of 61" in capsys.readouterr().err
    asked = [*arguments, "--prompts", str(folders / "chats.jsonl"), "--out", str(tmp_path / "asked")]
    asked += ["--max-new-tokens", "40"]
    assert main(asked) == 0
    kept = tmp_path / "asked" / "asked.json"
    settings = json.loads(kept.read_text())
    kept.write_text(json.dumps(settings | {"model_fingerprint": "0"}))  # the folder was tuned again since
    assert main(asked) == 2
    assert "another model_fingerprint" in capsys.readouterr().err
    del settings["model_fingerprint"]  # an earlier version kept none
    kept.write_text(json.dumps(settings))
    assert main(asked) == 0


def test_code_of_the_model_runs_where_it_is_trusted(folders, tmp_path, capsys):
    model, _ = loaded(folders)
    shutil.copytree(folders / "model", tmp_path / "own")
    own_code(tmp_path / "own")
    path = write_answers(tmp_path / "a.jsonl", own_answers(model))
    command = ["calibrate", "--model", str(tmp_path / "own"), "--heads", str(folders / "heads"), "--answers", path]
    command += ["--nodes", "8", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 0


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    ranks = random_ranks(1)
    reliability = Reliability.empty(HEADS)
    reliability.add(np.log(np.full((len(ranks), HEADS, TOP_K), 0.2)), ranks.ranks)
    plot(calibrate.report(ranks, reliability, 16), tmp_path / "calibration.png", "test")
    assert (tmp_path / "calibration.png").stat().st_size > 20_000
