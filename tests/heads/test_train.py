"""The trainer's states, losses and accuracies against path-by-path definitions, and that training helps."""

import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_apar.heads import MedusaHeads
from medusa_apar.heads.answers import AnswerFile, Answers, encode, encode_cached, greedy
from medusa_apar.heads.train import Settings, evaluate, load_model, train, window_losses

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


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("token_map", [None, torch.tensor([5, 6, 7, 9, 11, 13, FORK, EOS])])
def test_losses_equal_the_definition(model, token_map, hard):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(3, 1, 32, VOCABULARY, token_map=token_map).attach(model)
    torch.nn.init.normal_(heads.blocks[0].weight, std=0.1)
    losses, counts = window_losses(heads, answers, hard)
    ids = torch.arange(VOCABULARY) if token_map is None else token_map
    hidden = answers.hidden.float()
    for head in range(3):
        loss = count = 0
        for i in range(len(answers)):
            j = i + 1 + head
            if j >= len(answers) or answers.threads[i] != answers.threads[j]:
                continue
            target = (1 - hard) * model.lm_head(hidden[j])[ids].softmax(-1)
            target = target + hard * (ids == answers.next_ids[j])
            logits = model.lm_head(heads.hidden(hidden[i])[head])[ids]
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


def held_out_lines(out):
    return [json.loads(line)["held_out"] for line in (out / "train" / "log.jsonl").read_text().splitlines()]


def test_training_beats_untrained_heads(counting_model, data, tmp_path):
    settings = Settings(max_minutes=10, epochs=30, lr=1e-2, windows_per_step=1)
    heads = train(counting_model, data, tmp_path, num_heads=2, draft_vocab=40, settings=settings)
    first, *_, last = held_out_lines(tmp_path)
    for head in range(2):
        assert last["loss"][head] < 0.9 * first["loss"][head]
        assert last["top1"][head] > first["top1"][head] + 0.5
        assert last["top1"][head] <= last["top3"][head] <= last["top5"][head]
    saved = MedusaHeads.from_pretrained(tmp_path, counting_model)
    torch.testing.assert_close(saved.blocks[0].weight, heads.blocks[0].weight, atol=1e-3, rtol=1e-3)
    assert CHILD not in saved.token_map
    assert FORK in saved.token_map


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


def test_a_resumed_run_equals_one_in_one_go(counting_model, data, tmp_path):
    whole = Settings(max_minutes=60, epochs=4, eval_every=1000)
    expected = train(counting_model, data, tmp_path / "whole", num_heads=1, draft_vocab=0, settings=whole)
    steps = json.loads((tmp_path / "whole" / "train" / "log.jsonl").read_text().splitlines()[-1])["step"]

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    halves = Settings(max_minutes=60, epochs=4, eval_every=steps // 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(
            "medusa_apar.heads.train.Trainer.log", lambda self, *_: stop() if self.step > steps // 2 else None
        )
        train(counting_model, data, tmp_path / "halves", num_heads=1, draft_vocab=0, settings=halves)
    resumed = train(counting_model, data, tmp_path / "halves", num_heads=1, draft_vocab=0, settings=halves)
    for one, other in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # time moves the cosine by a hair


def test_states_are_cached_and_completed_later(counting_model, data, tmp_path, monkeypatch):
    file, cache = AnswerFile.read(data), tmp_path / "hidden.safetensors"
    complete = encode_cached(counting_model, file, [EOS], tmp_path / "other", "key", deadline=float("inf"))
    first = encode_cached(counting_model, file, [EOS], cache, "key", deadline=0.0)  # one record, whatever the deadline
    assert first.records.unique().tolist() == [0]
    again = encode_cached(counting_model, file, [EOS], cache, "key", deadline=float("inf"))
    for name in Answers.__slots__:
        assert torch.equal(getattr(again, name), getattr(complete, name))
    monkeypatch.setattr("medusa_apar.heads.answers.encode", None)  # nothing is left to encode
    assert len(encode_cached(counting_model, file, [EOS], cache, "key", deadline=float("inf"))) == len(complete)


def test_loss_of_zero_heads_is_that_of_the_next_token_distribution(model):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(1, 1, 32, VOCABULARY).attach(model)
    logits = model.lm_head(answers.hidden.float())
    same = answers.threads[:-1] == answers.threads[1:]
    expected = F.cross_entropy(logits[:-1][same], logits[1:][same].softmax(-1), reduction="sum")
    torch.testing.assert_close(window_losses(heads, answers)[0][0], expected)


def test_an_adapter_is_merged_with_its_token_rows(tmp_path):
    """The adapters of medusa_apar.finetune: LoRA, and whole rows for two tokens of a tied embedding."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], trainable_token_indices=[FORK, CHILD])
    tuned = get_peft_model(base, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    merged = load_model(str(tmp_path / "base"), str(tmp_path / "adapter"), torch.device("cpu"))
    input_ids = torch.tensor([[1, FORK, 2, CHILD, 3]])
    torch.testing.assert_close(merged(input_ids).logits, tuned.eval()(input_ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.get_output_embeddings().weight.shape == (VOCABULARY, 32)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
