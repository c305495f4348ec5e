"""Training a drafter helps, and a run that is cut goes on to the same result."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import medusa_apar
from medusa_apar.commands.cli import main
from medusa_apar.finetune.packing import pack_threads
from medusa_apar.heads import Eagle3Heads, load_heads
from medusa_apar.heads.answers import AnswerFile
from medusa_apar.heads.eagle3.losses import base_states
from medusa_apar.heads.eagle3.states import StateCache
from medusa_apar.heads.eagle3.train import Settings, Trainer, rounds_at, train
from medusa_apar.heads.train import Settings as HeadSettings
from medusa_apar.heads.train import make_heads
from medusa_apar.job import Job
from medusa_apar.models.families import end_tokens, unembedding_size
from tests.support.answers import CHILD, FORK, a_model_that_counts, counting_answers, held_out_lines


@pytest.fixture(scope="module")
def counting_model():
    return a_model_that_counts(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return counting_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


def run(model, path, out, **settings):
    settings = {"draft_vocab": 40, "epochs": 8, "lr": 5e-3, "batch": 256, "row_tokens": 64, "rounds": 3} | settings
    with Job(out, "train-heads", {}) as job:
        return train(model, AnswerFile.read(path), out, Settings(**settings), job)


@pytest.mark.parametrize("threads", [1, 2])
def test_training_beats_an_untrained_drafter(counting_model, data, tmp_path, threads):
    heads = run(counting_model, data, tmp_path, threads=threads)
    first, *_, last = held_out_lines(tmp_path)
    for number in range(3):
        assert last["loss"][number] < 0.9 * first["loss"][number]
        assert first["top1"][number] < last["top1"][number] <= last["top3"][number] <= last["top5"][number]
    saved = load_heads(tmp_path, counting_model)
    assert isinstance(saved, Eagle3Heads) and saved.boundaries == heads.boundaries
    torch.testing.assert_close(saved.network.fc, heads.network.fc, atol=1e-3, rtol=1e-3)
    assert CHILD not in saved.token_map and FORK in saved.token_map
    assert saved.acceptance[0][0] == pytest.approx(last["top1"][0], abs=1e-3)


def test_a_resumed_run_equals_one_in_one_go(counting_model, data, tmp_path, monkeypatch):
    expected = run(counting_model, data, tmp_path / "whole", epochs=4)
    from medusa_apar.heads.eagle3 import train as module

    saved = module.Trainer.save

    def cut(self):
        saved(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Trainer, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        run(counting_model, data, tmp_path / "halves", epochs=4, eval_every=2)
    monkeypatch.setattr(module.Trainer, "save", saved)
    again = run(counting_model, data, tmp_path / "halves", epochs=4, eval_every=2)
    for mine, its in zip(expected.network.parameters(), again.network.parameters(), strict=True):
        torch.testing.assert_close(mine, its)
    with pytest.raises(ValueError, match="holds a run"):
        run(counting_model, data, tmp_path / "halves", rounds=2)


def test_a_trained_drafter_saves_steps(counting_model, data, tmp_path):
    heads = run(counting_model, data, tmp_path)
    prompt = {"input_ids": torch.tensor([AnswerFile.read(data).records[0]["prompt_ids"]])}
    steps = {}
    for name, speculation in (("drafted", "even"), ("plain", "off")):
        apar = medusa_apar.attach(
            counting_model, heads, (FORK, CHILD), runtime="torch", speculation=speculation, budget=20
        )
        out = apar.generate(**prompt, do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
        steps[name] = out.stats.steps, out.sequences.tolist()
    assert steps["drafted"][1] == steps["plain"][1] and steps["drafted"][0] < 0.7 * steps["plain"][0]


@pytest.mark.parametrize("embedding", [False, True])
def test_training_goes_on_from_a_drafter_in_float16(counting_model, data, tmp_path, embedding):
    run(counting_model, data, tmp_path / "first", epochs=1)
    if embedding:  # as SpecForge's and speculators' files have one
        state = load_file(tmp_path / "first" / "model.safetensors")
        state["embed_tokens.weight"] = counting_model.get_input_embeddings().weight.half()
        save_file(state, tmp_path / "first" / "model.safetensors")
    second = run(counting_model, data, tmp_path / "second", init=str(tmp_path / "first"), draft_vocab=None)
    saved = load_heads(tmp_path / "second", counting_model, torch.float32)
    assert (saved.network.embedding is not None) == embedding
    assert saved.draft_vocab_size == 40  # as it was
    for mine, its in zip(second.network.parameters(), saved.network.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), its, atol=1e-3, rtol=1e-3)
    first = load_heads(tmp_path / "first", counting_model, torch.float32)
    assert not torch.allclose(first.network.fc, saved.network.fc, atol=1e-3)
    with pytest.raises(ValueError, match="holds an eagle3 drafter: go on with --kind eagle3"):
        make_heads(counting_model, HeadSettings(init=str(tmp_path / "first")), None)


def test_a_drafter_to_go_on_from_may_get_another_draft_vocabulary(counting_model, data, tmp_path):
    first = run(counting_model, data, tmp_path / "first", epochs=1)
    second = run(counting_model, data, tmp_path / "second", epochs=2, init=str(tmp_path / "first"), draft_vocab=12)
    vocab_size, ends = unembedding_size(counting_model)[0], list(end_tokens(counting_model.generation_config))
    wanted = AnswerFile.read(data).draft_vocabulary(12, vocab_size, ends)
    assert torch.equal(second.token_map, wanted)
    saved = load_heads(tmp_path / "second", counting_model, torch.float32)
    assert saved.token_map.tolist() == second.token_map.tolist() != first.token_map.tolist()
    whole = run(counting_model, data, tmp_path / "whole", epochs=1, init=str(tmp_path / "first"), draft_vocab=0)
    assert whole.token_map is None and whole.draft_vocab_size == vocab_size


TWO = """
import sys
import torch
from medusa_apar.heads.answers import AnswerFile
from medusa_apar.heads.eagle3.train import Settings, Trainer, train
from medusa_apar.job import Job, launched
from pathlib import Path
from tests.support.answers import a_model_that_counts

data, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
process, trained, gradients = launched(out), [], Trainer._gradients
def counted(self, row, *arguments):
    trained.append(len(row))
    return gradients(self, row, *arguments)
Trainer._gradients = counted
with Job(out, "train-heads", {}, process.is_main_process) as job:
    settings = Settings(draft_vocab=40, epochs=3, lr=5e-3, batch=256, row_tokens=64, rounds=3)
    heads = train(a_model_that_counts(2), AnswerFile.read(data), out, settings, job)
torch.save({"fc": heads.network.fc.detach(), "trained": trained}, out / f"process{process.process_index}.pt")
"""


def test_two_processes_train_what_one_does(counting_model, data, tmp_path, monkeypatch):
    trained, gradients = [], Trainer._gradients

    def counted(self, row, *arguments):
        trained.append(len(row))
        return gradients(self, row, *arguments)

    monkeypatch.setattr(Trainer, "_gradients", counted)
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {"PYTHONPATH": str(Path(__file__).parents[3]), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [*launch, tmp_path / "two.py", data, tmp_path / "two"]
    subprocess.run([str(word) for word in words], check=True, timeout=300, env=os.environ | paths)
    heads = run(counting_model, data, tmp_path / "one", epochs=3)
    one, two = (held_out_lines(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]  # one of them has written
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], abs=1e-2)
    assert two[-1]["top1"] == pytest.approx(one[-1]["top1"], abs=0.02)
    parts = [torch.load(tmp_path / "two" / f"process{index}.pt") for index in range(2)]
    assert sorted(parts[0]["trained"] + parts[1]["trained"]) == sorted(trained)  # each row by one of them
    assert min(sum(part["trained"]) for part in parts) > 0.3 * sum(trained)
    assert torch.equal(parts[0]["fc"], parts[1]["fc"])
    torch.testing.assert_close(parts[0]["fc"], heads.network.fc.detach(), atol=2e-2, rtol=2e-2)


def test_rounds_grow_to_all_of_them():
    grown = [rounds_at(done / 100, 5) for done in range(100)]
    assert grown == sorted(grown) and set(grown) == {2, 3, 5}
    assert {rounds_at(done / 100, 1) for done in range(100)} == {1}


def test_kept_states_are_those_that_are_made_anew(counting_model, data, tmp_path):
    heads = run(counting_model, data, tmp_path, epochs=1)
    rows = [pack_threads([([1, 5, *range(6, 6 + size)], -1, 0)], 2) for size in (9, 4, 12)]
    size = sum(each.nbytes for each in StateCache(heads).of(rows[0]))
    cache = StateCache(heads, room=size)  # room for the first alone
    for _ in range(2):
        for row in rows:
            for kept, made in zip(cache.of(row), base_states(heads, row), strict=True):
                assert torch.equal(kept, made)
    assert cache.of(rows[0])[0] is cache.of(rows[0])[0]
    assert cache.of(rows[1])[0] is not cache.of(rows[1])[0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--kind", "hydra", "--copy"], "no --kind hydra"),
        (["--kind", "eagle3", "--prompts"], "cannot answer --prompts"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(words, why, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medusa_apar.job.launched", lambda folder: SimpleNamespace(num_processes=2))
    assert main(["train-heads", *words, str(data), "--out", str(tmp_path / "out")]) == 2
    assert why in capsys.readouterr().err
