"""Training lowers the loss, resumes to the same result, and what it saves is what it trained."""

import copy
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import medusa_apar
from medusa_apar.commands.cli import main
from medusa_apar.finetune.adapter import attach_lora, control_rows, label_losses, save_adapter
from medusa_apar.finetune.base import load_base, spare_tokens
from medusa_apar.finetune.corpus import load_examples, read_examples
from medusa_apar.finetune.forms import Forms, pack
from medusa_apar.finetune.mixture import Limits, Source, draw, is_held_out, updates
from medusa_apar.finetune.packing import IGNORED, attention_mask
from medusa_apar.finetune.settings import Schedule

ANSWER = "\n".join(f"{n}. Head {n}: this detail is written in quite a few words." for n in range(1, 5))


def corpus(path, count=60):
    with path.open("w") as file:
        for n in range(count):
            answer = f"{ANSWER} {n}" if n % 2 else f"A short and plain answer number {n}."
            messages = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"example/{n}", "messages": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert main(["data", str(corpus(folder / "c.jsonl")), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def base(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def one_row(data, tokenizer, tokens):
    source = Source(load_examples(data / "examples.jsonl"))
    train, _, _ = draw([source], tokenizer, tokens, Limits(total=4000), seed=0)
    return next(row for row in forked(train, tokenizer, tokens) if (row.input_ids == tokens.fork).any())


def forked(examples, tokenizer, tokens):
    """A row an example, every detail a thread."""
    return list(pack(examples, tokenizer, tokens, Forms(), random.Random(0)))


def untied_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_losses_equal_those_of_the_plain_forward(data, model, tokenizer, tokens, tied):
    tuned = attach_lora(model if tied else untied_model(), tokenizer, tokens, rank=2)
    assert len(control_rows(tuned)) == (1 if tied else 2)
    row = one_row(data, tokenizer, tokens)
    logits = tuned(
        input_ids=row.input_ids[None], attention_mask=attention_mask(row.parents), position_ids=row.position_ids[None]
    ).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, row.labels(), ignore_index=IGNORED, reduction="none")
    losses = label_losses(tuned, row, tokens)
    torch.testing.assert_close(losses.values, expected[row.labels() != IGNORED], atol=1e-5, rtol=1e-5)
    assert int(losses.is_fork.sum()) == 4
    control = torch.autograd.grad(losses.values.sum(), control_rows(tuned), retain_graph=True)
    plain = torch.autograd.grad(expected.sum(), control_rows(tuned))
    torch.testing.assert_close(control, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reloaded_adapter_gives_the_same_logits(tmp_path, model, tokenizer, tokens, tied):
    model = model if tied else untied_model()
    fresh = copy.deepcopy(model)
    tuned = attach_lora(model, tokenizer, tokens, rank=2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.half())
    save_adapter(tuned, tmp_path / "adapter", tokenizer, tokens, "tiny", max_depth=2)
    merged = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload()
    ids = torch.tensor([[5, 60, tokens.fork, 70, tokens.child, 80]])
    torch.testing.assert_close(merged(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    places = [merged.get_input_embeddings().weight, merged.get_output_embeddings().weight]
    assert (places[0].data_ptr() == places[1].data_ptr()) == tied
    for weight, rows in zip(places, control_rows(tuned) * (2 if tied else 1), strict=True):
        assert torch.equal(weight[[tokens.fork, tokens.child]], rows)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    config = json.loads((tmp_path / "adapter/apar_config.json").read_text())
    assert (config["fork_token_id"], config["fork_token"], config["max_depth"]) == (tokens.fork, "<fork>", 2)


def test_bfloat16_trains_the_same_parameters_in_float32(data, model, tokenizer, tokens):
    row = one_row(data, tokenizer, tokens)
    full = attach_lora(copy.deepcopy(model), tokenizer, tokens, rank=2)
    half = attach_lora(model.bfloat16(), tokenizer, tokens, rank=2)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    ours, theirs = (label_losses(tuned, row, tokens).values.mean() for tuned in (half, full))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_the_mixture_keeps_shares_and_holds_examples_out(tmp_path, tokenizer, tokens):
    examples = list(read_examples([corpus(tmp_path / "c.jsonl", 400)]))
    apart = {example.id for example in examples if is_held_out(example.id)}
    drawn, held_out, _ = draw([Source(examples)], tokenizer, tokens, Limits(held_out=10**6), seed=0, plain_share=0.05)
    train = forked(drawn, tokenizer, tokens)

    def size(forking):
        return sum(len(row) for row in train if bool((row.input_ids == tokens.fork).any()) == forking)

    assert 0 < len(held_out) <= len(apart)
    assert size(False) == pytest.approx(0.05 * sum(map(len, train)), rel=0.1)
    groups = updates(train, row_tokens=400, update_tokens=1000)
    assert sum(len(row) for group in groups for row in group) == sum(map(len, train))
    assert all(len(row) <= max(400, max(map(len, train))) for group in groups for row in group)
    with pytest.raises(ValueError, match="share of plain answers is 1"):
        draw([Source(examples)], tokenizer, tokens, Limits(), seed=0, plain_share=1)


def test_sources_give_their_shares(tmp_path, tokenizer, tokens):
    examples = list(read_examples([corpus(tmp_path / "c.jsonl", 400)]))
    sources = [Source([e for e in examples if e.tree.forks], 3), Source([e for e in examples if not e.tree.forks], 1)]
    drawn, _, given = draw(sources, tokenizer, tokens, Limits(total=8000), seed=0)
    train = forked(drawn, tokenizer, tokens)
    # Each source has one side only, so it gives half of its share: 3/8 and 1/8 of 8000 tokens.
    forking = sum(len(row) for row in train if (row.input_ids == tokens.fork).any())
    assert forking == pytest.approx(3000, abs=300) and sum(map(len, train)) - forking == pytest.approx(1000, abs=100)
    assert [(side.side, round(side.wanted), side.tokens > 0) for side in given] == [
        ("forking", 3000, True), ("forking", 1000, False), ("plain", 3000, False), ("plain", 1000, True)
    ]  # fmt: skip


def test_shares_hold_without_a_total(tmp_path, tokenizer, tokens):
    examples = [example for example in read_examples([corpus(tmp_path / "c.jsonl", 400)]) if example.tree.forks]
    sources = [Source(examples[:40], 0.6, "few"), Source(examples[40:], 0.4, "many")]
    _, _, given = draw(sources, tokenizer, tokens, Limits(), seed=0, plain_share=0)
    few, many = given[:2]
    assert few.examples == sum(not is_held_out(example.id) for example in examples[:40])
    assert many.tokens == pytest.approx(few.tokens * 0.4 / 0.6, rel=0.05)


def test_the_schedule_ends_with_its_updates_or_its_time():
    schedule = Schedule(total_updates=100, budget_s=50.0, warmup=5)
    assert 0.19 < schedule.factor(0, 0.0) <= 0.2
    assert schedule.factor(100, 0.0) < 1e-9
    assert schedule.progress(10, 50.0) == 1.0 and schedule.factor(10, 50.0) < 1e-9
    assert Schedule(100, None, 5).progress(10, 1e9) == 0.1


def finetune(base, data, out, *more):
    arguments = ["finetune", "--base", base, "--data", data, "--out", out, "--rank", 4, "--lr", 0.02, "--warmup", 1,
                 "--update-tokens", 1000, "--save-every", 2, "--control-tokens", "<fork>", "<child>",
                 "--dtype", "float32", "--workers", 1, *more]  # fmt: skip
    return main([str(argument) for argument in arguments])


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_its_adapter_loads(tmp_path, base, data):
    out = tmp_path / "out"
    assert finetune(base, data, out) == 0
    report = json.loads((out / "report.json").read_text())
    assert (
        report["held_out"]["loss"] < report["held_out_before"]["loss"] - 0.08
    )  # a frozen random lm_head allows no more
    assert report["updates_done"] == report["updates"] and set(report["held_out"]) >= {"trunk", "fork", "thread"}
    apar = medusa_apar.load(out / "adapter")
    assert apar.control_token_ids.fork_id == 3 and apar.control_token_ids.max_depth == 1
    ids = torch.tensor([[5, 60, 70]])
    assert apar.generate(input_ids=ids, max_new_tokens=5).shape == (1, 8)
    assert finetune(base, data, out) == 0  # nothing is left to do
    assert [entry["event"] for entry in log(out)][-2:] == ["held_out", "end"]
    assert log(out)[-2]["loss"] == report["held_out"]["loss"]


def test_a_killed_run_resumes_to_the_same_result(tmp_path, base, data, monkeypatch):
    from medusa_apar.finetune.train import Trainer

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finetune(base, data, whole) == 0
    step = Trainer.step

    def killed(self, *arguments):
        if self.update == 3:  # one update past the checkpoint
            with (cut / "log.jsonl").open("a") as file:
                file.write('{"event": "upd')  # a kill may leave half a line
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", killed)
    assert finetune(base, data, cut) == 130
    assert not (cut / "adapter").exists()
    assert json.loads((cut / "log.jsonl").read_text().splitlines()[-1])["event"] == "stopped"
    monkeypatch.undo()
    assert finetune(base, data, cut) == 0
    files = [folder / "adapter/adapter_model.safetensors" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, cut)]
    assert reports[0]["held_out_before"] == reports[1]["held_out_before"]


def test_a_run_goes_on_that_began_before_there_was_a_setting(tmp_path, base, data):
    out = tmp_path / "out"
    assert finetune(base, data, out) == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    settings = json.loads(state["settings"])
    del settings["distil"]
    torch.save(state | {"settings": json.dumps(settings)}, out / "checkpoint.pt")
    assert finetune(base, data, out) == 0
    assert finetune(base, data, out, "--distil", 1) != 0  # which is another run


def test_a_taught_run_stays_nearer_to_its_base(tmp_path, base, data):
    found = {}
    for weight in (0.01, 10):
        out = tmp_path / str(weight)
        assert finetune(base, data, out, "--distil", weight) == 0
        found[weight] = json.loads((out / "report.json").read_text())
    assert found[10]["held_out"]["from_base"] < 0.7 * found[0.01]["held_out"]["from_base"]
    # Before the first update a control token in the context is all that differs.
    assert found[10]["held_out_before"]["from_base"] < 0.1 * found[0.01]["held_out"]["from_base"]


TWO_RUNS = """
import runpy
import sys
from medusa_apar.commands.cli import main
from medusa_apar.finetune import train
then = sys.argv.index("then")
again = sys.argv[then + 1:]
del sys.argv[then:]
try:
    runpy.run_module("medusa_apar", run_name="__main__")  # as a launcher's `-m medusa_apar` does
except SystemExit as end:
    assert not end.code
step = train.Trainer.step
def lagging(self, *arguments):
    if self.update == 0 and self.accelerator.process_index == 1:
        self.job.started -= 1e4  # a clock far ahead: by it, time is over
    entry = step(self, *arguments)
    with (self.job.folder / f"rates{self.accelerator.process_index}").open("a") as file:
        file.write(f"{entry['lr']}\\n")
    return entry
train.Trainer.step = lagging
sys.exit(main(again))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, fixed_model, tokenizer, data):
    """A folder with `base`, and what two CPU processes made of it: `two`, and `lagging`, where one's clock is ahead.

    One launch for both: until two processes have imported torch takes longer than all that they then do.
    """
    folder = tmp_path_factory.mktemp("two_processes")
    fixed_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "two_runs.py").write_text(TWO_RUNS)
    usual = ["finetune", "--base", folder / "base", "--data", data, "--rank", 4, "--update-tokens", 1000,
             "--control-tokens", "<fork>", "<child>", "--dtype", "float32", "--workers", 1]  # fmt: skip
    two = [*usual, "--out", folder / "two", "--lr", 0.02, "--warmup", 1, "--total-tokens", 2500]
    lagging = [*usual, "--out", folder / "lagging", "--total-tokens", 3500, "--max-minutes", 50]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    words = [str(word) for word in (*launch, folder / "two_runs.py", *two, "then", *lagging)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, capture_output=True, timeout=300, env=environment)
    return folder


def test_two_processes_train_what_one_does(tmp_path, two_processes, data):
    """Rows are shared out, gradients summed."""
    one, two = tmp_path / "one", two_processes / "two"
    assert finetune(two_processes / "base", data, one, "--total-tokens", 2500) == 0
    results = [json.loads((out / "report.json").read_text()) for out in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    assert results[0]["updates_done"] == results[1]["updates_done"] > 1
    assert results[1]["held_out"]["loss"] == pytest.approx(results[0]["held_out"]["loss"], abs=1e-3)
    updates = [[entry["loss"] for entry in log(out) if entry["event"] == "update"] for out in (one, two)]
    assert updates[1] == pytest.approx(updates[0], abs=1e-3)


def test_processes_go_by_one_clock(two_processes):
    rates = [(two_processes / "lagging" / f"rates{process}").read_text().splitlines() for process in (0, 1)]
    assert len(rates[0]) > 2 and rates[0] == rates[1]


def test_another_run_in_the_folder_is_refused(tmp_path, base, data, capsys):
    assert finetune(base, data, tmp_path / "out", "--total-tokens", 1500) == 0
    assert finetune(base, data, tmp_path / "out", "--total-tokens", 1600) == 2
    assert "holds a run with total_tokens 1500, not 1600" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["base", "weights", "data", "init", "control tokens"])
def test_a_run_of_another_model_or_data_is_refused(tmp_path, base, data, model, what, capsys):
    few = ["--total-tokens", 600, "--max-minutes", 1e-3]
    out, more, other = tmp_path / "out", [], data
    assert finetune(base, data, out, *few) == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != "log.jsonl"}
    if what == "base":
        base = base.rename(tmp_path / "elsewhere")
    elif what == "weights":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        model.save_pretrained(base)
    elif what == "data":
        other = tmp_path / "other"
        assert main(["data", str(corpus(tmp_path / "c.jsonl", 30)), "--out", str(other)]) == 0
    elif what == "init":
        more = ["--init", out / "adapter"]
    else:
        more = ["--control-tokens", "<child>", "<fork>"]
    assert finetune(base, other, out, *few, *more) == 2
    assert f"holds a run with {what} " in capsys.readouterr().err
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_short_side_is_told_and_reported(tmp_path, base, data, capsys):
    assert finetune(base, data, tmp_path / "out", "--total-tokens", 10**6, "--max-minutes", 1e-3) == 0
    assert capsys.readouterr().err.count("warning: ") == 1
    forking, plain = json.loads((tmp_path / "out/report.json").read_text())["mixture"]
    assert (forking["source"], forking["side"], plain["side"]) == (str(data), "forking", "plain")
    assert 0 < forking["tokens"] < forking["wanted"] == plain["wanted"] == 500_000


def test_nothing_held_out_is_no_loss(tmp_path, base):
    lines = [row for row in corpus(tmp_path / "c.jsonl", 60).read_text().splitlines(keepends=True)
             if not is_held_out(json.loads(row)["id"])]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(lines))
    assert main(["data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "d")]) == 0
    assert finetune(base, tmp_path / "d", tmp_path / "out", "--max-minutes", 1e-3) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["held_out_examples"] == 0 and report["held_out"]["loss"] is None


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, base, data, capsys, monkeypatch):
    """As `torchrun` starts them where there is no GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert finetune(base, data, tmp_path / "out") == 2
    assert "2 processes were started, but each would train alone" in capsys.readouterr().err


def test_going_on_from_an_adapter_starts_where_it_ended(tmp_path, base, data):
    assert finetune(base, data, tmp_path / "one") == 0
    assert finetune(base, data, tmp_path / "two", "--init", tmp_path / "one" / "adapter") == 0
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert second["held_out_before"]["loss"] == pytest.approx(
        first["held_out"]["loss"], abs=2e-3
    )  # float16 in the file


def test_control_tokens_are_spare_ones_or_new_ones(base, tokenizer):
    assert spare_tokens(tokenizer) is None
    added = load_base(str(base), torch.float32)
    assert added.added and added.tokens.fork == len(tokenizer) and added.tokens.child == len(tokenizer) + 1
    assert added.model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 2
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_special_token_{n}|>" for n in range(3)]})
    assert spare_tokens(tokenizer) == ("<|reserved_special_token_1|>", "<|reserved_special_token_2|>")


def test_an_adapter_with_new_tokens_brings_its_tokenizer(tmp_path, base, data):
    arguments = ["finetune", "--base", base, "--data", data, "--out", tmp_path / "out", "--rank", 2,
                 "--total-tokens", 800, "--dtype", "float32", "--workers", 1]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    apar = medusa_apar.load(tmp_path / "out" / "adapter")
    assert apar.tokenizer.convert_ids_to_tokens([apar.control_token_ids.fork_id]) == ["[Fork]"]
    assert apar.model.get_input_embeddings().weight.shape[0] == len(apar.tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--data", "nowhere"], "holds no examples.jsonl"), (["--init", "nowhere"], "holds no adapter_config.json"),
     (["--base", "/nowhere"], "nowhere")],
)  # fmt: skip
def test_bad_arguments_are_refused(tmp_path, data, capsys, arguments, message):
    usual = {"--base": "smollm2-135m", "--data": str(data), "--out": str(tmp_path / "out")} | dict([arguments])
    assert main(["finetune", *(word for pair in usual.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


def test_sources_without_shares_give_all_they_have(tmp_path, tokenizer, tokens):
    examples = list(read_examples([corpus(tmp_path / "c.jsonl", 60)]))
    forking = [example for example in examples if example.tree.forks]
    sources = [Source(forking[:5]), Source(forking[5:]), Source([e for e in examples if not e.tree.forks])]
    train, _, _ = draw(sources, tokenizer, tokens, Limits(), seed=0, plain_share=0.1)
    drawn = sum(bool(example.tree.forks) for example in train)
    assert drawn == sum(not is_held_out(example.id) for example in forking)
    with pytest.raises(ValueError, match="1 of 3 sources have a share"):
        draw([Source(forking, 0.5), *sources[1:]], tokenizer, tokens, Limits(), seed=0)


@pytest.mark.parametrize("texts", [("a", "a"), ("", "b"), (" ", "b")])
def test_control_tokens_that_cannot_be_are_refused(tmp_path, base, data, capsys, texts):
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--dtype", "float32", "--control-tokens", *texts]
    assert main(["finetune", "--base", str(base), *options]) == 2
    assert "they must be two, with a text each" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "config"])
def test_an_adapter_to_go_on_from_that_is_damaged_is_said(tmp_path, base, data, capsys, damage):
    options = ["--data", str(data), "--dtype", "float32", "--rank", "1", "--total-tokens", "600"]
    assert main(["finetune", "--base", str(base), *options, "--out", str(tmp_path / "one")]) == 0
    adapter = tmp_path / "one" / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    content = {"cut": weights.read_bytes()[:900], "empty": b"", "text": b"no weights", "config": b'{"peft_type": 5}'}
    (config if damage == "config" else weights).write_bytes(content[damage])
    capsys.readouterr()
    more = ["--init", str(adapter), "--out", str(tmp_path / "two")]
    assert main(["finetune", "--base", str(base), *options, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("medusa-apar: ") and str(adapter) in error
    assert not (tmp_path / "two" / "adapter").exists()
