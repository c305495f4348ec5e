"""`medusa-apar train-heads`: heads that load, and what must not be mixed up."""

import json
import shutil

import pytest
import torch

from medusa_apar.commands.cli import main
from medusa_apar.heads.ask import as_record
from medusa_apar.loading import load
from tests.support.answers import RECORD, counting_answers
from tests.support.folders import own_code
from tests.support.models import CHILD as TINY_CHILD
from tests.support.models import FORK as TINY_FORK
from tests.support.models import VOCAB, tiny_model
from tests.support.models import model_of as compiled_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return counting_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return tuned_folder(tmp_path_factory.mktemp("tuned"), tiny_model(scale=6.0))


def tuned_folder(folder, model):
    """A folder with a tiny forking model, its tokenizer and its control tokens."""
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


@pytest.mark.parametrize(
    "options", [["--kind", "medusa"], ["--kind", "hydra"], ["--kind", "hydra", "--aux-layers", "0"]]
)
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


def test_the_command_makes_a_drafter_that_loads_and_refuses_what_it_would_ignore(tuned, tmp_path, capsys):
    questions = ["why", "how", "when", "where to go", "what is it", "who"]
    copied = write_chats(tmp_path / "corpus.jsonl", questions, "That is a long answer")
    command = ["train-heads", "--model", str(tuned), "--out", str(tmp_path / "heads"), "--copy", copied]
    command += ["--kind", "eagle3", "--draft-vocab", "40", "--epochs", "2", "--batch", "64", "--threads", "1"]
    assert main(command) == 0
    assert main(command) == 0  # nothing is left to do
    apar = load(tuned, heads=tmp_path / "heads")
    assert apar.heads.kind == "eagle3" and apar.heads.boundaries == (1, 2)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(apar.generate(**inputs), load(tuned, heads=None).generate(**inputs))
    for foreign in (["--num-heads", "3"], ["--temperature", "0.5"], ["--boundaries", "1", "--init", str(tmp_path)]):
        assert main([*command, *foreign]) == 2
        assert "means nothing with" in capsys.readouterr().err
    medusa = [part if part != "eagle3" else "hydra" for part in command]
    assert main([*medusa, "--boundaries", "1"]) == 2
    assert "--boundaries means nothing with --kind hydra" in capsys.readouterr().err


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


def test_a_rounded_model_answers(tmp_path, capsys):
    """Its records are those of `generate` in int8."""
    folder = tuned_folder(tmp_path / "wide", compiled_model(fork=0.9))
    prompts = write_chats(tmp_path / "prompts.jsonl", ["why", "how", "when", "where to go"])
    command = command_on(folder, tmp_path, "--prompts", prompts, "--dtype", "float32", "--answer-batch", "1")
    assert main([*command, "--quantize", "int8"]) == 0
    records = {r["id"]: r for r in map(json.loads, (tmp_path / "heads" / "answers.jsonl").read_text().splitlines())}
    for differs, options in ((False, {"quantize": "int8"}), (True, {})):
        apar = load(folder, heads=None, speculation="off", **options)
        made = {}
        for name, record in records.items():
            ids = torch.tensor([record["prompt_ids"]])
            answer = apar.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
            made[name] = as_record(name, answer.paragraph_tree[0])
        assert (made != records) == differs
    assert main(command) == 2
    assert "made with another quantize (int8, now None)" in capsys.readouterr().err


def test_rounding_without_prompts_is_refused(data, tmp_path, capsys):
    assert main(["train-heads", "--answers", str(data), "--quantize", "int8", "--out", str(tmp_path / "out")]) == 2
    assert "--quantize is of the model that answers --prompts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_drafter_needs_a_torch_with_muon(tmp_path, capsys, monkeypatch):
    """Which is said before any prompt is answered."""
    monkeypatch.delattr(torch.optim, "Muon")
    prompts = write_chats(tmp_path / "prompts.jsonl", ["why"])
    command = ["train-heads", "--model", "nowhere", "--prompts", prompts, "--kind", "eagle3"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "is trained with torch 2.9 or newer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
