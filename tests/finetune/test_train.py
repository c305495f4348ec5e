"""Training lowers the loss, resumes, and what it saves is what it trained."""

import copy
import json

import torch
from peft import PeftModel

from medusa_apar.finetune.adapter import attach_lora, control_rows, label_losses, save_adapter
from medusa_apar.finetune.corpus import read_examples
from medusa_apar.finetune.mixture import Limits, draw, is_held_out, updates
from medusa_apar.finetune.packing import IGNORED, attention_mask
from medusa_apar.finetune.train import Schedule, main

ANSWER = "\n".join(f"{n}. Head {n}: this detail is written in quite a few words." for n in range(1, 5))


def corpus(path, count=60):
    with path.open("w") as file:
        for n in range(count):
            answer = ANSWER if n % 2 else "A short and plain answer."
            messages = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": f"example/{n}", "messages": messages}) + "\n")
    return path


def one_row(path, tokenizer, tokens):
    train, _ = draw(read_examples([corpus(path)]), tokenizer, tokens, Limits(total=4000), seed=0)
    return next(row for row in train if (row.input_ids == tokens.fork).any())


def test_losses_equal_those_of_the_plain_forward(tmp_path, model, tokenizer, tokens):
    tuned = attach_lora(model, tokenizer, tokens, rank=2)
    row = one_row(tmp_path / "c.jsonl", tokenizer, tokens)
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


def test_a_reloaded_adapter_gives_the_same_logits(tmp_path, model, tokenizer, tokens):
    fresh = copy.deepcopy(model)
    tuned = attach_lora(model, tokenizer, tokens, rank=2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.half())
    save_adapter(tuned, tmp_path, tokenizer, tokens, "tiny")
    merged = PeftModel.from_pretrained(fresh, str(tmp_path)).merge_and_unload()
    ids = torch.tensor([[5, 60, tokens.fork, 70, tokens.child, 80]])
    torch.testing.assert_close(merged(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    weight = merged.get_input_embeddings().weight
    assert merged.lm_head.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(weight[[tokens.fork, tokens.child]], control_rows(tuned))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    config = json.loads((tmp_path / "apar_config.json").read_text())
    assert (config["fork_token_id"], config["fork_token"], config["base"]) == (tokens.fork, "<fork>", "tiny")


def test_held_out_examples_are_never_trained(tmp_path, tokenizer, tokens):
    examples = list(read_examples([corpus(tmp_path / "c.jsonl", 200)]))
    apart = sum(is_held_out(example.id) for example in examples)
    train, held_out = draw(examples, tokenizer, tokens, Limits(total=10**9), seed=0)
    assert apart == len(held_out) > 0 and len(train) == 200 - apart
    groups = updates(train, row_tokens=400, update_tokens=1000)
    assert sum(len(row) for group in groups for row in group) == sum(map(len, train))
    assert all(len(row) <= max(400, max(map(len, train))) for group in groups for row in group)


def test_the_schedule_ends_with_its_budget():
    schedule = Schedule(total_updates=100, budget_s=50.0, warmup=5)
    assert 0.19 < schedule.factor(0) <= 0.2
    assert schedule.factor(100) < 1e-9
    schedule.earlier_s = 50.0
    assert schedule.progress(10) == 1.0 and schedule.factor(10) < 1e-9


def test_a_run_learns_resumes_and_writes_its_adapter(tmp_path, model, tokenizer):
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = [
        "--base", base, "--data", corpus(tmp_path / "c.jsonl"), "--out", out, "--rank", 4, "--lr", 0.02, "--warmup", 1,
        "--update-tokens", 1000, "--save-every", 2, "--fork-token-id", 3, "--child-token-id", 4,
    ]  # fmt: skip
    main([*map(str, arguments), "--max-minutes", "2"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held_out = [entry for entry in log if entry["event"] == "held_out"]
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.08  # a frozen random lm_head allows no more
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    done = log[-1]["update"]
    main([*map(str, arguments), "--max-minutes", "2"])  # takes up the checkpoint: nothing is left to do
    again = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][len(log) :]
    assert [entry["event"] for entry in again] == ["held_out", "end"] and again[-1]["update"] == done
    assert again[0]["loss"] == held_out[-1]["loss"]
