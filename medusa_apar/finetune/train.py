"""The training loop: LoRA and the control rows on trie-packed paragraph trees, within a wall-clock budget."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_apar.finetune.adapter import Losses, attach_lora, control_rows, label_losses, save_adapter
from medusa_apar.finetune.corpus import read_examples
from medusa_apar.finetune.mixture import Limits, draw, updates
from medusa_apar.finetune.packing import PackedRow, Tokens


@dataclass(slots=True)
class Schedule:
    """Warm-up, then a cosine to zero over whichever ends first, the updates or the time."""

    total_updates: int
    budget_s: float
    warmup: int
    started: float = field(default_factory=time.monotonic)
    earlier_s: float = 0.0  # spent before a resume

    @property
    def elapsed_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def progress(self, update: int) -> float:
        """0 at the start, 1 when the last update or the last second is used."""
        return min(1.0, max(update / self.total_updates, self.elapsed_s / self.budget_s))

    def factor(self, update: int) -> float:
        """What the peak learning rate is multiplied with."""
        return min(1.0, (update + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.progress(update)))


class Tally:
    """Mean losses by what the label is: fork decisions, other trunk tokens, thread tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, losses: Losses) -> None:
        parts = {
            "fork": losses.is_fork,
            "trunk": losses.in_trunk & ~losses.is_fork,
            "thread": ~losses.in_trunk & ~losses.is_fork,
        }
        for name, chosen in parts.items():
            self.sums[name] += float(losses.values[chosen].sum())
            self.counts[name] += int(chosen.sum())
        self.sums["fork_recall"] += int((losses.says_fork & losses.is_fork).sum())
        self.counts["fork_recall"] += int(losses.is_fork.sum())
        self.sums["fork_precision"] += int((losses.says_fork & losses.is_fork).sum())
        self.counts["fork_precision"] += int(losses.says_fork.sum())

    def means(self) -> dict[str, float | None]:
        names = ["trunk", "fork", "thread", "fork_recall", "fork_precision"]
        means = {name: round(self.sums[name] / self.counts[name], 4) if self.counts[name] else None for name in names}
        labels = sum(self.counts[name] for name in names[:3])
        return {"loss": round(sum(self.sums[name] for name in names[:3]) / max(1, labels), 4), **means}


class Trainer:
    """A tuned model, its optimiser and its log; `step` is one update.

    Rows are worked on by single-threaded workers side by side: one operation split over both cores waits for the
    slower core each time, and on a shared machine that cost 16 ms an operation (17 times slower).
    """

    def __init__(self, tuned, tokens: Tokens, schedule: Schedule, args: argparse.Namespace) -> None:
        rows = control_rows(tuned)
        lora = [p for p in tuned.parameters() if p.requires_grad and p is not rows]
        groups = [{"params": lora, "peak": args.lr}, {"params": [rows], "peak": args.row_lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parameters = [*lora, rows]
        self.workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.tuned, self.tokens, self.schedule, self.out = tuned, tokens, schedule, args.out
        self.update = 0

    def step(self, rows: list[PackedRow]) -> dict[str, float | None]:
        """One update on the given rows; returns what the log shows of it."""
        began = time.monotonic()
        factor = self.schedule.factor(self.update)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        labels = sum(int((row.labels() >= 0).sum()) for row in rows)
        tally = Tally()
        longest_first = sorted(rows, key=len, reverse=True)
        for gradients, losses in self.workers.map(lambda row: self._gradients(row, labels), longest_first):
            tally.add(losses)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1
        tokens = sum(map(len, rows))
        return {
            "update": self.update,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": round(float(norm), 3),
            "tokens": tokens,
            "tok_s": round(tokens / (time.monotonic() - began), 1),
            **tally.means(),
        }

    def _gradients(self, row: PackedRow, labels: int) -> tuple[tuple[torch.Tensor, ...], Losses]:
        """A row's share of an update of so many labels, and its losses."""
        losses = label_losses(self.tuned, row, self.tokens)
        gradients = torch.autograd.grad(losses.values.sum() / labels, self.parameters)
        losses.values = losses.values.detach()
        return gradients, losses

    def evaluate(self, rows: list[PackedRow]) -> dict[str, float | None]:
        """Held-out losses, one row an example."""
        tally = Tally()
        for losses in self.workers.map(self._losses, rows):
            tally.add(losses)
        return tally.means()

    @torch.no_grad()
    def _losses(self, row: PackedRow) -> Losses:
        return label_losses(self.tuned, row, self.tokens)

    def log(self, **entry) -> None:
        entry["elapsed_s"] = round(self.schedule.elapsed_s, 1)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    def save(self) -> None:
        """What `resume` needs, written beside and then moved, so that a kill leaves the last one whole."""
        state = {name: p for name, p in self.tuned.named_parameters() if p.requires_grad}
        partial = self.out / "checkpoint.partial"
        torch.save(
            {
                "weights": state,
                "optimizer": self.optimizer.state_dict(),
                "update": self.update,
                "elapsed_s": self.schedule.elapsed_s,
            },
            partial,
        )
        partial.replace(self.out / "checkpoint.pt")

    def resume(self) -> None:
        """Takes up the checkpoint in the output folder, if there is one."""
        file = self.out / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        parameters = dict(self.tuned.named_parameters())
        with torch.no_grad():
            for name, value in state["weights"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]
        self.schedule.earlier_s = state["elapsed_s"]


def train(args: argparse.Namespace) -> None:
    """One run, from the arguments of `main` to an adapter folder."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, attn_implementation="sdpa")
    tokens = Tokens(args.fork_token_id, args.child_token_id, tokenizer.eos_token_id)
    tuned = attach_lora(model, tokenizer, tokens, args.rank, 2 * args.rank)
    rows, held_out = draw(read_examples(args.data), tokenizer, tokens, Limits(total=args.total_tokens), args.seed)
    groups = updates(rows, args.row_tokens, args.update_tokens)
    schedule = Schedule(len(groups), 60 * args.max_minutes, args.warmup)
    trainer = Trainer(tuned, tokens, schedule, args)
    trainer.resume()
    about = {"examples": len(rows), "packed_tokens": sum(map(len, rows)), "updates": len(groups)}
    if not trainer.update:
        trainer.log(event="start", **about, args={key: str(value) for key, value in vars(args).items()})
        trainer.log(event="held_out", update=0, **trainer.evaluate(held_out))
        schedule.started = time.monotonic()
    while trainer.update < len(groups) and schedule.progress(trainer.update) < 1.0:
        trainer.log(event="update", **trainer.step(groups[trainer.update]))
        if trainer.update % args.save_every == 0:
            trainer.save()
        if trainer.update % args.evaluate_every == 0:
            trainer.log(event="held_out", update=trainer.update, **trainer.evaluate(held_out))
    trainer.save()
    trainer.log(event="held_out", update=trainer.update, **trainer.evaluate(held_out))
    save_adapter(tuned, args.out / "adapter", tokenizer, tokens, args.base_name or args.base.name)
    trainer.log(event="end", update=trainer.update)


def main(argv: list[str] | None = None) -> None:
    """`python -m medusa_apar.finetune`: one run; started again with the same arguments, it resumes."""
    parser = argparse.ArgumentParser(prog="medusa_apar.finetune", description=main.__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--base-name", help="what apar_config.json calls the base (default: the folder's name)")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="chat JSONL files, gzipped or not")
    parser.add_argument("--out", type=Path, required=True, help="log, checkpoint and adapter/ go here")
    parser.add_argument("--max-minutes", type=float, default=48, help="the schedule ends here at the latest")
    parser.add_argument("--total-tokens", type=int, default=450_000, help="packed tokens to draw from the data")
    parser.add_argument("--row-tokens", type=int, default=384)
    parser.add_argument("--update-tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--row-lr", type=float, default=2e-3, help="for the two control rows")
    parser.add_argument("--warmup", type=int, default=5, help="updates")
    parser.add_argument("--save-every", type=int, default=20, help="updates between checkpoints")
    parser.add_argument("--evaluate-every", type=int, default=40, help="updates between held-out losses")
    parser.add_argument("--fork-token-id", type=int, default=15)
    parser.add_argument("--child-token-id", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="rows worked on at a time, one core each")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))
