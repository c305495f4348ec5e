"""The trainer's states, losses and accuracies against path-by-path definitions, and that training helps."""

import copy
import gzip
import json
import random
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_apar.commands.cli import main
from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from medusa_apar.heads import train as trainer
from medusa_apar.heads.answers import AnswerFile, Answers, Encoder, Store, encode, encode_rows, greedy
from medusa_apar.heads.ask import answered, read_prompts
from medusa_apar.heads.losses import WINDOW, evaluate, ridge_start, window_losses
from medusa_apar.heads.train import Settings, train
from medusa_apar.job import Job
from medusa_apar.loading import load
from tests.support.folders import own_code
from tests.support.models import CHILD as TINY_CHILD
from tests.support.models import FORK as TINY_FORK
from tests.support.models import VOCAB, tiny_model
from tests.support.tokenizers import tiny_tokenizer

VOCABULARY, FORK, CHILD, EOS = 47, 43, 44, 45


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


RECORD = {
    "prompt_ids": [1, 2, 3, 4],
    "threads": [
        {"parent": -1, "fork_index": 0, "token_ids": [5, 6, FORK, 7, 8, FORK, 9, EOS]},
        {"parent": 0, "fork_index": 2, "token_ids": [CHILD, 10, FORK, 11, EOS]},
        {"parent": 0, "fork_index": 5, "token_ids": [CHILD, 12, 13]},  # cut by a limit
        {"parent": 1, "fork_index": 2, "token_ids": [CHILD, 14, EOS]},
    ],
}


def paths(record):
    """(path before the thread's first own position, own tokens) of each thread; the trunk's begins in the prompt."""
    threads = record["threads"]

    def before(index):
        thread = threads[index]
        if index == 0:
            return record["prompt_ids"]
        return before(thread["parent"]) + threads[thread["parent"]]["token_ids"][: thread["fork_index"] + 1]

    return [(before(index), thread["token_ids"]) for index, thread in enumerate(threads)]


def test_states_are_those_of_each_threads_path(model):
    file = AnswerFile([RECORD])
    assert (file.fork_id, file.child_id) == (FORK, CHILD)
    answers = encode(model, file, 0, [EOS])
    hidden, next_ids, chosen = [], [], []
    for index, (before, own) in enumerate(paths(RECORD)):
        path = torch.tensor(before + own)
        states = model.model(path[None]).last_hidden_state[0]
        first = len(before) - (index == 0)  # the prompt's last position predicts the trunk's first token
        for place in range(first, len(path)):
            if path[place] == EOS:
                continue
            hidden.append(states[place])
            next_ids.append(int(path[place + 1]) if place + 1 < len(path) else -100)
            logits = model.lm_head(states[place])
            logits[CHILD] = -torch.inf
            if path[place] in (FORK, CHILD):
                logits[FORK] = -torch.inf
            chosen.append(int(logits.argmax()))
    torch.testing.assert_close(answers.hidden.float(), torch.stack(hidden), atol=2e-3, rtol=2e-3)
    assert answers.next_ids.tolist() == next_ids
    assert greedy(model, file, answers).tolist() == chosen
    assert answers.threads.tolist() == [0] * 8 + [1] * 4 + [2] * 3 + [3] * 2


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_states_see_no_further_than_a_layers_window(family):
    """Packed rows were once read with the path mask alone, as if every layer saw the whole path."""
    model = tiny_model(family)
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    for index, (before, own) in enumerate(paths(RECORD)):
        states = model.model(torch.tensor([before + own])).last_hidden_state[0]
        mine = answers.hidden[answers.threads == index].float()
        first = len(before) - (index == 0)
        torch.testing.assert_close(mine, states[first : first + len(mine)], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("hard", "temperature"), [(0.0, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
@pytest.mark.parametrize("token_map", [None, torch.tensor([5, 6, 7, 9, 11, 13, FORK, EOS])])
def test_losses_equal_the_definition(model, token_map, kind, hard, temperature):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = kind(3, 1, 32, VOCABULARY, token_map=token_map).attach(model)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    losses, counts = window_losses(heads, answers, hard, temperature)
    ids = torch.arange(VOCABULARY) if token_map is None else token_map
    hidden = answers.hidden.float()
    for head in range(3):
        loss = count = 0
        for i in range(len(answers)):
            j = i + 1 + head
            if j >= len(answers) or answers.threads[i] != answers.threads[j]:
                continue
            target = (1 - hard) * (model.lm_head(hidden[j])[ids] / temperature).softmax(-1)
            target = target + hard * (ids == answers.next_ids[j])
            drafted = answers.ids[i + 1 : j + 1]  # the thread's own tokens between
            drafted = torch.cat([drafted, drafted.new_zeros(2 - head)])[None]
            logits = model.lm_head(heads.states(hidden[i : i + 1], drafted)[head, 0])[ids]
            loss, count = loss - (target * logits.log_softmax(-1)).sum(), count + 1
        torch.testing.assert_close(losses[head], loss)
        assert counts[head] == count


def test_only_the_heads_learn(model):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(2, 2, 32, VOCABULARY, token_map=torch.arange(20)).attach(model)
    window_losses(heads, answers)[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads.parameters())


def test_draft_vocabulary_holds_fork_and_end_but_not_child():
    file = AnswerFile([RECORD, RECORD | {"prompt_ids": [30, 30, 31]}])
    assert file.draft_vocabulary(2, VOCABULARY, [EOS]).tolist() == [FORK, EOS]
    small = file.draft_vocabulary(12, VOCABULARY, [EOS]).tolist()
    assert small == sorted(set(range(5, 15)) | {FORK, EOS})  # all of the answers, nothing else
    assert 30 in file.draft_vocabulary(13, VOCABULARY, [EOS])  # then the prompts' most frequent
    assert CHILD not in file.draft_vocabulary(46, VOCABULARY, [EOS])


@pytest.fixture(scope="module")
def counting_model():
    """A model without layers that prefers token t+1 after token t: its heads can learn to count further."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=0, num_attention_heads=1, eos_token_id=EOS
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0) * 0.3)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 answers that count, each with a child that goes on counting where the trunk did."""
    draw, lines = random.Random(0), []
    for _ in range(21):
        start = draw.randrange(40)
        trunk, child = ([(start + i) % 40 for i in range(length)] for length in (50, 30))
        threads = [
            {"parent": -1, "fork_index": 0, "token_ids": [*trunk[:3], FORK, *trunk[3:], EOS]},
            {"parent": 0, "fork_index": 3, "token_ids": [CHILD, *child]},
        ]
        lines.append(json.dumps({"prompt_ids": [start, start], "threads": threads}))
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(model, path, out, **settings):
    with Job(out, "train-heads", {}) as job:
        return train(model, AnswerFile.read(path), out, Settings(**settings), job)


def held_out_lines(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "held_out"]


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


def test_accuracy_counts_the_bases_greedy_tokens(counting_model, data):
    file = AnswerFile.read(data)
    answers = Answers.join([encode(counting_model, file, 0, [EOS])])
    heads = MedusaHeads(1, 1, 32, VOCABULARY).attach(counting_model)
    chosen = greedy(counting_model, file, answers)
    hits = count = 0
    for i in range(len(answers) - 1):
        if answers.threads[i] == answers.threads[i + 1]:
            count += 1
            hits += int(heads.logits(answers.hidden[i : i + 1].float())[0, 0].argmax() == chosen[i + 1])
    assert evaluate(heads, answers, chosen)["top1"][0] == pytest.approx(hits / count)


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
            "medusa_apar.heads.train.Trainer.evaluate", lambda self, *_: stop() if self.step > steps // 2 else None
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
    run(counting_model, data, tmp_path / "second", epochs=0.5, init=str(tmp_path / "first"), num_heads=7)
    before, after = held_out_lines(tmp_path / "first")[-1], held_out_lines(tmp_path / "second")[0]
    assert after["loss"] == pytest.approx(before["loss"], abs=0.02)  # but for float16


def test_encoding_goes_on_where_it_was_stopped(model, tmp_path, monkeypatch):
    records = [RECORD | {"prompt_ids": [1 + i % 20, 2, 3]} for i in range(70)]
    file = AnswerFile(records)
    monkeypatch.setattr("medusa_apar.heads.answers.SHARD_RECORDS", 16)
    complete = Encoder(model, file, [EOS], tmp_path / "other", threads=2).run(range(70))
    assert len(complete) == 5
    encoder = Encoder(model, file, [EOS], tmp_path / "states")
    assert len(encoder.run(range(70), go_on=lambda: False)) == 1  # one shard, whatever the time
    again = encoder.run(range(70))
    for one, other in zip(complete, again, strict=True):
        assert one.name == other.name
        stores = Store([one])[:], Store([other])[:]
        for name in Answers.__slots__:
            torch.testing.assert_close(getattr(stores[0], name), getattr(stores[1], name))
    monkeypatch.setattr("medusa_apar.heads.answers.encode_rows", None)  # nothing is left to encode
    assert encoder.run(range(70)) == again
    with pytest.raises(TypeError):  # other records are other shards
        encoder.run(range(1, 70))


def test_a_store_is_its_shards_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr("medusa_apar.heads.answers.SHARD_RECORDS", 2)
    file = AnswerFile([RECORD | {"prompt_ids": [1 + i, 2, 3]} for i in range(5)])
    store = Store(Encoder(model, file, [EOS], tmp_path).run(range(5)))
    expected = [encode(model, file, record, [EOS]) for record in range(5)]
    size = len(expected[0])
    assert len(store) == 5 * size
    joined = Answers.join(expected)
    for start, stop in ((0, 5 * size), (3, 9), (size, 4 * size), (4 * size - 1, 9 * size), (2 * size - 1, 2 * size)):
        part = store[start:stop]
        torch.testing.assert_close(part.hidden, joined.hidden[start:stop], atol=2e-3, rtol=2e-3)
        assert torch.equal(part.ids, joined.ids[start:stop])
        assert torch.equal(part.records, joined.records[start:stop])
    assert len(store[:].threads.unique()) == 5 * 4


def test_records_of_one_pass_are_those_of_their_own(model):
    file = AnswerFile([RECORD, RECORD | {"prompt_ids": [9, 8]}])
    both = encode_rows(model, file, [0, 1], [EOS])
    alone = Answers.join([encode(model, file, 0, [EOS]), encode(model, file, 1, [EOS])])
    torch.testing.assert_close(both.hidden, alone.hidden, atol=2e-3, rtol=2e-3)
    assert torch.equal(both.next_ids, alone.next_ids)
    assert torch.equal(both.records, alone.records)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: broken JSON"),
        ('{"threads": []}', ":2: no answer record"),
        ('{"prompt_ids": [], "threads": [{"token_ids": [1]}]}', ":2: .* impossible"),
        (
            '{"prompt_ids": [1], "threads": [{"token_ids": [1]}, {"parent": 0, "fork_index": 4, "token_ids": [4]}]}',
            ":2: .* impossible",
        ),
    ],
)
def test_bad_answer_files_are_refused_with_their_line(tmp_path, line, words):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=words):
        AnswerFile.read(path)


@pytest.mark.parametrize("taps", [(), (0, 1)])
@pytest.mark.parametrize("sequential", [True, False])
def test_ridge_start_is_the_regression_of_the_future_state(model, tmp_path, taps, sequential):
    draw = random.Random(1)
    threads = [{"parent": -1, "fork_index": 0, "token_ids": [draw.randrange(40) for _ in range(30)]}]
    file = AnswerFile([{"prompt_ids": [1 + i % 30, 2], "threads": threads} for i in range(60)])
    store = Store(Encoder(model, file, [EOS], tmp_path, taps).run(range(60)))
    heads = HydraHeads(2, 1, 32, VOCABULARY, None, taps, sequential).attach(model)
    answers = store[:]
    assert ridge_start(heads, store, positions=10**6) == int(answers.same_thread(2).sum())
    states = heads.states(answers.hidden, answers.drafted(2))
    for head in range(2):
        valid = answers.same_thread(2)
        wanted = answers.hidden[1 + head :, :32].float()[: len(valid)][valid]
        error = (states[head][: len(valid)][valid] - wanted).square().mean()
        assert error < 0.8 * wanted.var(dim=0, unbiased=False).mean()
        read = torch.cat([answers.hidden.float(), torch.ones(len(answers), 1)], dim=1)[: len(valid)][valid]
        if not sequential:  # the normal equations hold, but for the ridge
            solved = torch.linalg.lstsq(read, wanted).solution
            assert error < 1.2 * (read @ solved - wanted).square().mean() + 1e-3


def test_loss_of_zero_heads_is_that_of_the_next_token_distribution(model):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(1, 1, 32, VOCABULARY).attach(model)
    logits = model.lm_head(answers.hidden.float())
    same = answers.threads[:-1] == answers.threads[1:]
    expected = F.cross_entropy(logits[:-1][same], logits[1:][same].softmax(-1), reduction="sum")
    torch.testing.assert_close(window_losses(heads, answers)[0][0], expected)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with a tiny forking model, its tokenizer and its control tokens."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tiny_model(scale=6.0)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    control = {"fork_token_id": TINY_FORK, "child_token_id": TINY_CHILD, "max_depth": 2}
    (folder / "apar_config.json").write_text(json.dumps(control))
    return folder


def write_chats(path, questions, answer=None):
    lines = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        if answer:
            messages.append({"role": "assistant", "content": f"{question}. {answer}"})
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("options", [["--kind", "medusa"], ["--kind", "hydra"], ["--kind", "hydra", "--taps", "0"]])
def test_the_command_makes_heads_that_load(tuned, tmp_path, options):
    questions = ["why", "how", "when", "where to go", "what is it", "who"]
    prompts = write_chats(tmp_path / "prompts.jsonl", questions)
    copied = write_chats(tmp_path / "corpus.jsonl", questions, "That is a long answer")
    command = ["train-heads", "--model", str(tuned), "--out", str(tmp_path / "heads"), "--prompts", prompts]
    command += ["--copy", copied, "--num-heads", "2", "--draft-vocab", "40", "--max-new-tokens", "20"]
    command += ["--answer-batch", "4", "--epochs", "1", "--batch", "256", "--threads", "1", "--device", "cpu", *options]
    assert main(command) == 0
    answers = (tmp_path / "heads" / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 6
    assert main(command) == 0  # nothing is left to do
    assert (tmp_path / "heads" / "answers.jsonl").read_text() == answers
    apar = load(tuned, heads=tmp_path / "heads")
    assert apar.heads.num_heads == 2
    assert apar.heads.kind == options[1]
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(apar.generate(**inputs), load(tuned, heads=None).generate(**inputs))
    assert json.loads((tmp_path / "heads" / "report.json").read_text())["records"] > 6


def test_half_a_line_left_by_a_kill_is_answered_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c", "thr')
    assert answered(path) == {"a", "b"}
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}\n{oops', "prompts.jsonl:2: broken JSON"),
        ('{"question": "x"}', "prompts.jsonl:1: wrong schema"),
        ('{"messages": [{"role": "user"}]}', "prompts.jsonl:1: wrong schema"),
        ('{"messages": [{"role": "user", "content": " "}]}', "prompts.jsonl:1: no question"),
        ("\n", "there is no prompt in"),
        (None, "prompts.jsonl does not exist"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(tmp_path, capsys, lines, words):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text(lines)
    assert main(["train-heads", "--model", "nowhere", "--out", str(tmp_path / "out"), "--prompts", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_learn_from_is_refused(tmp_path, capsys):
    assert main(["train-heads", "--out", str(tmp_path)]) == 2
    assert "give --prompts, --answers or --copy" in capsys.readouterr().err


# ---- what must not be mixed up


def test_a_models_folder_is_no_place_for_heads(tuned, data, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    command = ["train-heads", "--model", "nowhere", "--answers", str(data), "--out", str(tmp_path / "model")]
    assert main(command) == 2
    assert "holds a llama model, whose config.json stays" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    assert not (tmp_path / "model" / "train").exists()


def held_out_and_kept(records, own=None):
    file = AnswerFile(records, own=own)
    kept, held_out = trainer._by_prompt(file, Settings())
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
    assert trainer._by_prompt(AnswerFile(own[:1]), Settings()) == ([0], [0])


def test_states_of_an_earlier_version_are_not_computed_again(counting_model, data, tmp_path, monkeypatch):
    file = AnswerFile.read(data)
    kept, held_out = trainer._by_place(file, Settings())
    assert held_out == [0, 20]
    encoder = Encoder(counting_model, file, [EOS], tmp_path / "train" / "states")
    encoder.run(held_out), encoder.run(kept)
    monkeypatch.setattr("medusa_apar.heads.answers.encode_rows", None)
    run(counting_model, data, tmp_path, num_heads=2, draft_vocab=40, epochs=1)


def test_every_held_out_position_counts_once(model):
    length = 2 * WINDOW + 3
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (length,), generator=draw)
    hidden = torch.randn(length, 32, generator=draw).half()
    none = torch.zeros(length, dtype=torch.long)
    answers = Answers(hidden, ids, ids.roll(-1), none, none)
    heads = MedusaHeads.random(model, 4)
    chosen = torch.randint(0, 40, (length,), generator=draw)
    found = evaluate(heads, answers, chosen)
    losses, counts = window_losses(heads, answers)
    assert counts.tolist() == [length - 1 - head for head in range(4)]
    assert found["loss"] == pytest.approx((losses / counts).tolist(), rel=1e-4)
    guesses = heads.logits(hidden.float()).argmax(-1)
    for head in range(4):
        hits = (guesses[head, : -1 - head] == chosen[1 + head :]).float().mean()
        assert found["top1"][head] == pytest.approx(float(hits), abs=1e-6)


@pytest.mark.parametrize("limit", [0, 1, 2, None])
def test_threads_at_the_depth_limit_do_not_fork(model, tmp_path, limit):
    file = AnswerFile([RECORD, RECORD | {"prompt_ids": [9, EOS], "threads": RECORD["threads"][:1]}, RECORD])
    file.max_depth = limit
    expected = [0] * 8 + [1] * 7 + [2] * 2
    answers = Store(Encoder(model, file, [EOS], tmp_path).run(range(3)))[:]
    assert file.thread_depths(answers).tolist() == expected + [0] * 7 + expected
    lifted = copy.deepcopy(model)
    lifted.lm_head.weight[FORK] = 0
    answers.hidden[:, 0] = 100  # [Fork] would win everywhere
    lifted.lm_head.weight[FORK, 0] = 100
    forks = greedy(lifted, file, answers) == FORK
    control = (answers.ids == FORK) | (answers.ids == CHILD)
    allowed = ~control & (file.thread_depths(answers) < (9 if limit is None else limit))
    assert forks.tolist() == allowed.tolist()


def test_a_thread_whose_trunk_has_no_position_keeps_its_depth(model):
    threads = [
        {"parent": -1, "fork_index": 0, "token_ids": [EOS]},
        {"parent": 0, "fork_index": 0, "token_ids": [CHILD]},
    ]
    file = AnswerFile([RECORD, {"prompt_ids": [1, EOS], "threads": threads}])
    file.child_id = CHILD
    assert file.thread_depths(encode(model, file, 1, [EOS])).tolist() == [1]
    with pytest.raises(ValueError, match="hidden states of other answers"):
        AnswerFile([RECORD]).thread_depths(encode(model, file, 1, [EOS]))


def command_on(tuned, tmp_path, *options):
    return ["train-heads", "--model", str(tuned), "--out", str(tmp_path / "heads"), "--num-heads", "1", *options] + [
        *("--max-new-tokens", "12", "--epochs", "1", "--threads", "1", "--device", "cpu", "--draft-vocab", "0")
    ]


def test_ids_beyond_the_vocabulary_are_refused_with_their_line(tuned, tmp_path, capsys):
    thread = {"parent": -1, "fork_index": -1, "token_ids": [5, 6, VOCAB]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n" + json.dumps({"prompt_ids": [5], "threads": [thread]}))
    assert main(command_on(tuned, tmp_path, "--answers", str(path))) == 2
    assert f"a.jsonl:3: id {VOCAB} is beyond the model's vocabulary of {VOCAB}" in capsys.readouterr().err


def test_answers_of_another_model_or_with_other_settings_are_not_gone_on_with(tuned, tmp_path, capsys):
    prompts = write_chats(tmp_path / "prompts.jsonl", ["why", "how", "when", "where to go", "what is it"])
    command = command_on(tuned, tmp_path, "--prompts", prompts)
    assert main(command) == 0
    report = (tmp_path / "heads" / "report.json").read_text()
    assert "Infinity" not in report and json.loads(report)["settings"]["answer_minutes"] is None
    shutil.rmtree(tmp_path / "heads" / "train")
    other = load(tuned, heads=None)
    other.model.get_output_embeddings().weight.data[7] += 1
    other.model.save_pretrained(tmp_path / "other")
    for file in tuned.iterdir():
        if not (tmp_path / "other" / file.name).exists():
            shutil.copy(file, tmp_path / "other")
    before = (tmp_path / "heads" / "answers.jsonl").read_bytes()
    for changed, words in (
        (command_on(tmp_path / "other", tmp_path, "--prompts", prompts), "another model_fingerprint"),
        ([*command, "--max-new-tokens", "13"], "another max_new_tokens"),
    ):
        assert main(changed) == 2
        assert f"holds answers made with {words}" in capsys.readouterr().err
    assert (tmp_path / "heads" / "answers.jsonl").read_bytes() == before
    (tmp_path / "heads" / "asked.json").unlink()  # as an earlier version left it
    assert main(command) == 0


def test_a_run_that_trains_asks_no_more(tuned, tmp_path):
    prompts = write_chats(tmp_path / "prompts.jsonl", ["why", "how", "when", "where to go", "what is it"])
    command = command_on(tuned, tmp_path, "--prompts", prompts)
    assert main([*command, "--count", "3"]) == 0
    answers = (tmp_path / "heads" / "answers.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "heads" / "answers.jsonl").read_bytes() == answers


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


def test_code_of_the_model_runs_where_it_is_trusted(tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "own")
    own_code(tmp_path / "own")
    prompts = write_chats(tmp_path / "prompts.jsonl", ["why", "how", "when", "where to go"])
    command = command_on(tmp_path / "own", tmp_path, "--prompts", prompts)
    assert main(command) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("device", ["banana", "cuda:77", "", "cpu:x"])
def test_a_device_that_is_not_there_is_said(tuned, data, tmp_path, capsys, device):
    options = ["--answers", str(data), "--device", device, "--out", str(tmp_path / "out")]
    assert main(["train-heads", "--model", str(tuned), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"medusa-apar: --device {device}".strip()) and error.count("\n") == 1
    assert "is none that torch can use here" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_shard_of_hidden_states_is_named(model, tmp_path, content):
    (path,) = Encoder(model, AnswerFile([RECORD]), [EOS], tmp_path).run(range(1))
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ValueError, match=f"{path} is damaged: delete it, and the next run makes it anew") as error:
        Store([path])
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_said(tuned, tmp_path, capsys):
    out, prompts = tmp_path / "out", tmp_path / "p.jsonl"
    prompts.write_text("".join(f'{{"messages": [{{"role": "user", "content": "a{n}"}}]}}\n' for n in range(4)))
    command = ["train-heads", "--model", str(tuned), "--prompts", str(prompts), "--out", str(out), "--epochs", "0.1"]
    command += ["--max-new-tokens", "4", "--dtype", "float32"]
    assert main(command) == 0
    state = out / "train" / "state.pt"
    state.write_bytes(state.read_bytes()[:500])
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"medusa-apar: {state} is damaged: delete it to start anew, or give another --out"
    )
