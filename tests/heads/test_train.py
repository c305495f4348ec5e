"""The trainer: training helps, resumed runs equal whole ones, and nobody is trained on and held out."""

import copy
import json

import pytest
import torch

from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from medusa_apar.heads.answers import AnswerFile, Encoder
from medusa_apar.heads.held_out import by_place, by_prompt
from medusa_apar.heads.train import Settings, train
from medusa_apar.job import Job
from tests.support.answers import CHILD, EOS, FORK, RECORD, a_model_that_counts, counting_answers, held_out_lines


@pytest.fixture(scope="module")
def counting_model():
    return a_model_that_counts()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return counting_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


def run(model, path, out, **settings):
    with Job(out, "train-heads", {}) as job:
        return train(model, AnswerFile.read(path), out, Settings(**settings), job)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_training_beats_untrained_heads(counting_model, data, tmp_path, kind, threads):
    settings = {"kind": kind, "start": "zero", "num_heads": 2, "draft_vocab": 40, "epochs": 30, "lr": 1e-2}
    heads = run(counting_model, data, tmp_path, batch=256, threads=threads, **settings)
    first, *_, last = held_out_lines(tmp_path)
    for head in range(2):
        assert last["loss"][head] < 0.9 * first["loss"][head]
        assert last["top1"][head] > first["top1"][head] + 0.5
        assert last["top1"][head] <= last["top3"][head] <= last["top5"][head]
    saved = load_heads(tmp_path, counting_model)
    assert type(saved) is (MedusaHeads if kind == "medusa" else HydraHeads)
    torch.testing.assert_close(saved.blocks[0].weight, heads.blocks[0].weight, atol=1e-3, rtol=1e-3)
    assert CHILD not in saved.token_map
    assert FORK in saved.token_map
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["held_out"]["top1"] == pytest.approx(last["top1"], abs=1e-3)
    assert saved.acceptance[0][0] == pytest.approx(last["top1"][0], abs=1e-3)


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_a_resumed_run_equals_one_in_one_go(counting_model, data, tmp_path, kind):
    settings = {"kind": kind, "num_heads": 2, "draft_vocab": 0, "epochs": 4, "batch": 512}
    expected = run(counting_model, data, tmp_path / "whole", eval_every=1000, **settings)
    steps = held_out_lines(tmp_path / "whole")[-1]["step"]

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(
            "medusa_apar.heads.train.Trainer._evaluate", lambda self, *_: stop() if self.step > steps // 2 else None
        )
        run(counting_model, data, tmp_path / "halves", eval_every=steps // 2, **settings)
    resumed = run(counting_model, data, tmp_path / "halves", eval_every=steps // 2, **settings)
    for one, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # time moves the cosine by a hair
    with pytest.raises(ValueError, match=r"made with another num_heads \(2, now 3\)"):
        run(counting_model, data, tmp_path / "halves", **settings | {"num_heads": 3})
    for name, value in (("lr", 1e-3), ("start", "zero"), ("hard", 0.5), ("temperature", 0.5)):
        with pytest.raises(ValueError, match=f"made with another {name}"):
            run(counting_model, data, tmp_path / "halves", **settings | {name: value})
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text() + "\n" + json.dumps(RECORD))
    with pytest.raises(ValueError, match="another data_fingerprint"):
        run(counting_model, other, tmp_path / "halves", **settings)
    tuned = copy.deepcopy(counting_model)
    tuned.lm_head.weight[3] += 1
    with pytest.raises(ValueError, match="another model_fingerprint"):
        run(tuned, data, tmp_path / "halves", **settings)
    path = tmp_path / "halves" / "train" / "state.pt"  # of an earlier version, which kept less
    state = torch.load(path, weights_only=True)
    for name in ("lr", "start", "hard", "temperature", "data_fingerprint", "model_fingerprint"):
        del state["settings"][name]
    torch.save(state, path)
    run(counting_model, data, tmp_path / "halves", **settings)
    assert "model_fingerprint" in torch.load(path, weights_only=True)["settings"]


def test_training_goes_on_from_given_heads(counting_model, data, tmp_path):
    settings = {"num_heads": 2, "draft_vocab": 40, "batch": 256}
    run(counting_model, data, tmp_path / "first", epochs=20, lr=1e-2, **settings)
    init = {"epochs": 0.5, "init": str(tmp_path / "first"), "num_heads": 7}
    second = run(counting_model, data, tmp_path / "second", **init, draft_vocab=None)
    before, after = held_out_lines(tmp_path / "first")[-1], held_out_lines(tmp_path / "second")[0]
    assert after["loss"] == pytest.approx(before["loss"], abs=0.02)  # but for float16
    assert (second.num_heads, second.draft_vocab_size) == (2, 40)
    third = run(counting_model, data, tmp_path / "third", **init, draft_vocab=12)
    assert third.draft_vocab_size == 12 and set(third.token_map.tolist()) < set(second.token_map.tolist())


def held_out_and_kept(records, own=None):
    file = AnswerFile(records, own=own)
    kept, held_out = by_prompt(file, Settings().eval_positions)
    prompts = [[tuple(records[index]["prompt_ids"]) for index in part] for part in (kept, held_out)]
    assert not set(prompts[0]) & set(prompts[1])
    return kept, held_out


def test_no_prompt_is_trained_on_and_held_out():
    own = [RECORD | {"id": str(i), "prompt_ids": [i, 2, 3]} for i in range(1000)]
    copied = [record | {"threads": [{"parent": -1, "fork_index": -1, "token_ids": [7, EOS]}]} for record in own]
    kept, held_out = held_out_and_kept(own)
    assert 25 < len(held_out) < 100 and len(kept) + len(held_out) == 1000
    # The same answers given twice, and other answers to the same prompts.
    twice = held_out_and_kept(own + [record | {"id": "again"} for record in own])
    assert twice == (kept, held_out)
    with_copies = held_out_and_kept(own + copied, own=1000)
    assert with_copies[1] == held_out and len(with_copies[0]) == 2 * len(kept)
    # In another order the same prompts are held out.
    turned = own[::-1]
    assert {turned[i]["id"] for i in held_out_and_kept(turned)[1]} == {own[i]["id"] for i in held_out}
    for count in range(2, 12):
        few, one = held_out_and_kept(own[:count])
        assert few and one
    assert by_prompt(AnswerFile(own[:1]), Settings().eval_positions) == ([0], [0])


def test_states_of_an_earlier_version_are_not_computed_again(counting_model, data, tmp_path, monkeypatch):
    file = AnswerFile.read(data)
    kept, held_out = by_place(file, Settings().eval_positions)
    assert held_out == [0, 20]
    encoder = Encoder(counting_model, file, [EOS], tmp_path / "train" / "states")
    encoder.run(held_out), encoder.run(kept)
    monkeypatch.setattr("medusa_apar.heads.answers.encode_rows", None)
    run(counting_model, data, tmp_path, num_heads=2, draft_vocab=40, epochs=1)
