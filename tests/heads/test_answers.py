"""Answer files and their hidden states, against path-by-path definitions."""

import copy
import json

import pytest
import torch

from medusa_apar.heads.answers import AnswerFile, Answers, Encoder, Store, encode, encode_rows, greedy
from tests.support.answers import CHILD, EOS, FORK, RECORD, VOCABULARY, small_model
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def model():
    return small_model()


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


def test_draft_vocabulary_holds_fork_and_end_but_not_child():
    file = AnswerFile([RECORD, RECORD | {"prompt_ids": [30, 30, 31]}])
    assert file.draft_vocabulary(2, VOCABULARY, [EOS]).tolist() == [FORK, EOS]
    small = file.draft_vocabulary(12, VOCABULARY, [EOS]).tolist()
    assert small == sorted(set(range(5, 15)) | {FORK, EOS})  # all of the answers, nothing else
    assert 30 in file.draft_vocabulary(13, VOCABULARY, [EOS])  # then the prompts' most frequent
    assert CHILD not in file.draft_vocabulary(46, VOCABULARY, [EOS])


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


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_shard_of_hidden_states_is_named(model, tmp_path, content):
    (path,) = Encoder(model, AnswerFile([RECORD]), [EOS], tmp_path).run(range(1))
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ValueError, match=f"{path} is damaged: delete it, and the next run makes it anew") as error:
        Store([path])
    assert "\n" not in str(error.value)
