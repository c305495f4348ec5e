"""A long command's files: what it reads back is sound or is said to be damaged."""

import pickle
from contextlib import nullcontext

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

from medusa_apar import job
from medusa_apar.commands.cli import in_a_sentence
from medusa_apar.job import append_lines, cut_half_a_line, quiet, read_checkpoint
from medusa_apar.reading import reading


class Code:
    """What a pickle may hold that is no state."""

    def __reduce__(self):
        return print, ("run",)


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"step": 3, "weights": [torch.arange(9.0)], "settings": "{}"}, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def damages(content):
    yield from (content[: len(content) * tenth // 10] for tenth in range(10))
    yield b"text"
    yield b"PK\x03\x04"
    yield pickle.dumps(Code())
    yield pickle.dumps({"step": 3})


def test_a_damaged_checkpoint_is_said_without_torchs_advice(checkpoint, capsys):
    assert read_checkpoint(checkpoint, ("step", "weights"))["weights"][0].tolist() == list(range(9))
    sentence = r"state\.pt is damaged: delete it to start anew, or give another --out"
    for content in damages(checkpoint.read_bytes()):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as said:
            read_checkpoint(checkpoint, ("step", "weights"))
        assert said.value.__cause__ is None and said.value.__suppress_context__
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("state", [{"step": 3}, [1], torch.zeros(2)])
def test_a_checkpoint_of_something_else_is_said(checkpoint, state):
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="is of another command or version, without step, weights"):
        read_checkpoint(checkpoint, ("step", "weights"))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), OSError(5, "I/O error")]
)
def test_a_checkpoint_that_cannot_be_read_here_is_not_called_damaged(checkpoint, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        read_checkpoint(checkpoint, ("step", "weights"))


def test_a_checkpoint_from_a_gpu_is_read_without_one(tmp_path):
    """As torch saves it there: the storage is tagged with the device that it lay on."""
    tag = torch.serialization.location_tag
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"weights": torch.arange(3.0)}, tmp_path / "state.pt")
    assert torch.serialization.location_tag is tag
    with pytest.raises(RuntimeError) if not torch.cuda.is_available() else nullcontext():
        torch.load(tmp_path / "state.pt", weights_only=True)
    weights = read_checkpoint(tmp_path / "state.pt", ("weights",))["weights"]
    assert weights.device.type == "cpu" and weights.tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_too_little_memory_is_no_fault_of_a_file(error):
    with pytest.raises(type(error)) as raised, reading("a model"):
        raise error
    assert raised.value is error and in_a_sentence(error) == "there is not enough memory for that"


def test_lines_are_added_and_half_ones_taken_away(tmp_path):
    path = tmp_path / "l.jsonl"
    append_lines(path, [{"a": "é\u2028"}, {"a": 2}])
    whole = path.read_bytes()
    assert whole.decode() == '{"a": "é\u2028"}\n{"a": 2}\n'
    path.write_bytes(whole + '{"a": "é'.encode()[:-1])
    cut_half_a_line(path)
    assert path.read_bytes() == whole
    append_lines(path, [])
    assert path.read_bytes() == whole
    path.write_bytes(b'{"a"')
    cut_half_a_line(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_download_is_seen_on_a_terminal_alone(monkeypatch, terminal):
    was_on = logging.is_progress_bar_enabled()
    monkeypatch.setattr(job.sys.stderr, "isatty", lambda: terminal, raising=False)
    try:
        quiet()
        assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled() == (not terminal)
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
