"""Train Medusa heads on the tuned model's own answers:  python -m medusa_apar.heads.train --model DIR --data FILE ...

Head h at a thread's position i must match the distribution the base itself has at position i+1+h of that thread
(cross-entropy with soft targets, weighted 0.8^h). The base is frozen and its states are computed once (`answers.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa_apar.heads.answers import AnswerFile, Answers, encode_cached, greedy
from medusa_apar.heads.modules import MedusaHeads

HEAD_DECAY = 0.8  # head h counts 0.8^h (Medusa, section 3.2)
WINDOW = 256  # positions whose logits exist at once: 8 MB per head at 8192 ids
WARMUP = 0.03  # of the run
HELD_OUT = 0.05  # of the records
RANKS = 5  # guesses per head that are counted
TOPS = (1, 3, 5)


@dataclass(slots=True)
class Settings:
    max_minutes: float = 20.0
    epochs: int = 8
    lr: float = 1e-3
    hard: float = 0.0  # weight of the token that was written; the rest is the base's distribution
    windows_per_step: int = 4
    eval_every: int = 50  # steps
    eval_windows: int = 16
    seed: int = 0


def window_losses(heads: MedusaHeads, part: Answers, hard: float = 0.0) -> tuple[Tensor, Tensor]:
    """Per head, summed cross-entropy and number of positions ([heads] each) of contiguous positions `part`."""
    with torch.no_grad():
        targets = heads.unembed(part.hidden).float().softmax(-1)  # [T, draft vocabulary]
        if hard:
            targets = targets.mul_(1 - hard) + hard * _one_hot(heads, part.next_ids)
    states = heads.hidden(part.hidden)
    losses, counts = [], []
    for head in range(heads.num_heads):
        ahead = 1 + head
        same_thread = part.threads[:-ahead] == part.threads[ahead:]
        logits = heads.unembed(states[head, :-ahead]).float()
        losses.append((F.cross_entropy(logits, targets[ahead:], reduction="none") * same_thread).sum())
        counts.append(same_thread.sum())
    return torch.stack(losses), torch.stack(counts)


def _one_hot(heads: MedusaHeads, ids: Tensor) -> Tensor:
    """[T] ids -> [T, draft vocabulary]; a row of zeros where an id is not in it."""
    vocabulary = heads.token_map
    if vocabulary is None:
        vocabulary = torch.arange(heads.vocab_size, device=ids.device)
    return (ids[:, None] == vocabulary).float()


@torch.no_grad()
def evaluate(heads: MedusaHeads, answers: Answers, greedy: Tensor) -> dict[str, list[float]]:
    """Loss per head; how often `greedy`, the base's own choice [T], is among a head's first 1, 3 and 5.

    `heads.acceptance` becomes the share of every rank: what draft trees are made from.
    """
    total = torch.zeros(2 + RANKS, heads.num_heads, dtype=torch.double)
    for start in range(0, len(answers), WINDOW):
        end = start + WINDOW + heads.num_heads
        part, chosen = answers[start:end], greedy[start:end]
        if len(part) <= heads.num_heads:
            break
        losses, counts = window_losses(heads, part)
        total[:2] += torch.stack([losses.cpu(), counts.cpu()]).double()
        token_ids, _ = heads.draft(part.hidden, RANKS)
        for head in range(heads.num_heads):
            ahead = 1 + head
            same_thread = part.threads[:-ahead] == part.threads[ahead:]
            hits = (token_ids[:-ahead, head] == chosen[ahead:, None])[same_thread]
            total[2:, head] += hits.sum(0).cpu()
    means = total / total[1].clamp(min=1)
    heads.acceptance = means[2:].T.tolist()
    return {"loss": means[0].tolist()} | {f"top{top}": means[2 : 2 + top].sum(0).tolist() for top in TOPS}


class Trainer:
    """The loop, its log and its checkpoint (`train/` in the output folder)."""

    def __init__(
        self,
        heads: MedusaHeads,
        model: PreTrainedModel,
        file: AnswerFile,
        answers: Answers,
        out: Path,
        settings: Settings,
    ) -> None:
        self.heads, self.out, self.settings = heads, out, settings
        # Every twentieth record, so that a file sorted by topic is held out evenly. A lone record serves both ends.
        held_out = answers.records % round(1 / HELD_OUT) == 0
        self.answers = answers if bool(held_out.all()) else answers[~held_out]
        self.held_out = answers[held_out][: settings.eval_windows * WINDOW]
        self.greedy = greedy(model, file, self.held_out)
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.lr, weight_decay=0.0)
        self.step, self.seconds = 0, 0.0  # done so far, earlier runs included
        windows_per_epoch = math.ceil(len(self.answers) / WINDOW)
        self.last_step = math.ceil(settings.epochs * windows_per_epoch / settings.windows_per_step)
        (out / "train").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        started, before = time.monotonic(), self.seconds
        if self.step == 0:
            self.log(evaluate(self.heads, self.held_out, self.greedy))
        while (progress := self.progress()) < 1:
            loss = self.train_step(progress)
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if self.step % self.settings.eval_every == 0:
                self.log(evaluate(self.heads, self.held_out, self.greedy), loss)
                self.save()
        self.log(evaluate(self.heads, self.held_out, self.greedy))
        self.save()

    def progress(self) -> float:
        """Of the run, by whichever of time and steps is further: the cosine ends where the run does."""
        return max(self.step / self.last_step, self.seconds / (60 * self.settings.max_minutes))

    def train_step(self, progress: float) -> list[float]:
        scale = min(1.0, (progress + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * scale
        heads = self.heads
        weights = torch.tensor([HEAD_DECAY**head for head in range(heads.num_heads)], device=self.answers.hidden.device)
        sums, positions = torch.zeros_like(weights), torch.zeros_like(weights)
        for start in self.window_starts():
            losses, counts = window_losses(
                heads, self.answers[start : start + WINDOW + heads.num_heads], self.settings.hard
            )
            # Every window divides by the same number, so that short threads weigh by their positions.
            ((losses * weights).sum() / (WINDOW * self.settings.windows_per_step)).backward()
            sums, positions = sums + losses.detach(), positions + counts
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (sums / positions.clamp(min=1)).tolist()

    def window_starts(self) -> list[int]:
        """This step's windows. Each epoch cuts the answers at another offset; (seed, step) decides all."""
        per_step, last = self.settings.windows_per_step, max(1, len(self.answers) - self.heads.num_heads - 1)
        per_epoch = math.ceil(len(self.answers) / WINDOW)
        starts = []
        for index in range(self.step * per_step, (self.step + 1) * per_step):
            epoch, place = divmod(index, per_epoch)
            generator = random.Random(f"{self.settings.seed} {epoch}")
            offset, order = generator.randrange(WINDOW), list(range(per_epoch))
            generator.shuffle(order)
            starts.append((order[place] * WINDOW + offset) % last)
        return starts

    def log(self, held_out: dict[str, list[float]], loss: list[float] | None = None) -> None:
        line = {"step": self.step, "minutes": round(self.seconds / 60, 2), "train_loss": loss, "held_out": held_out}
        with (self.out / "train" / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        shown = {name: [round(value, 3) for value in values] for name, values in held_out.items()}
        print(f"step {self.step}/{self.last_step}  {self.seconds / 60:.1f} min  held out: {shown}", flush=True)

    def save(self) -> None:
        """Heads ready for use in the output folder, and what `resume` needs."""
        self.heads.save_pretrained(self.out)
        state = {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.out / "train" / f".state.{os.getpid()}"
        torch.save(state | {"step": self.step, "seconds": self.seconds}, temporary)
        os.replace(temporary, self.out / "train" / "state.pt")

    def resume(self) -> None:
        """Go on from the output folder's checkpoint, if there is one."""
        path = self.out / "train" / "state.pt"
        if path.exists():
            state = torch.load(path, map_location=self.answers.hidden.device, weights_only=True)
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]


def load_model(model: str, adapter: str | None, device: torch.device) -> PreTrainedModel:
    """The tuned model, frozen, its adapter merged; float32 on a CPU, bfloat16 elsewhere."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    torch.nn.Module.to(loaded, device)  # PreTrainedModel wraps `to` without its signature
    return loaded.eval().requires_grad_(False)


def train(
    model: PreTrainedModel,
    data: Path,
    out: Path,
    num_heads: int = 4,
    num_layers: int = 1,
    draft_vocab: int = 8192,
    settings: Settings | None = None,
    key: str = "",
) -> MedusaHeads:
    """V2 heads for `model`, also saved in `out`. `key` names the model in the cache of hidden states."""
    settings = settings or Settings()
    started = time.monotonic()
    (out / "train").mkdir(parents=True, exist_ok=True)
    file = AnswerFile.read(data)
    eos = model.generation_config.eos_token_id
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    token_map = file.draft_vocabulary(draft_vocab, vocab_size, eos_ids) if 0 < draft_vocab < vocab_size else None
    heads = MedusaHeads(num_heads, num_layers, hidden_size, vocab_size, token_map=token_map)
    heads.to(model.device).attach(model)

    key = f"{key} {hashlib.sha256(data.read_bytes()).hexdigest()}"
    # Half of the time at most goes into the base's forward passes.
    deadline = started + 30 * settings.max_minutes
    answers = encode_cached(model, file, eos_ids, out / "train" / "hidden.safetensors", key, deadline)
    used = int(answers.records[-1]) + 1
    print(
        f"{len(answers)} positions of {used}/{len(file.records)} answers, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    trainer = Trainer(heads, model, file, answers.to(model.device), out, settings)
    trainer.resume()
    trainer.seconds += time.monotonic() - started
    trainer.run()
    return heads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m medusa_apar.heads.train", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the base, or of the tuned model")
    parser.add_argument("--adapter", help="peft adapter that is merged into --model")
    parser.add_argument("--data", type=Path, required=True, help="answers of the tuned model (JSONL)")
    parser.add_argument("--out", type=Path, required=True, help="gets the heads; train/ in it gets log and checkpoint")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=1, help="residual blocks per head")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="ids that heads can propose, 0: all")
    parser.add_argument("--max-minutes", type=float, default=20.0, help="in all, resumed runs included")
    parser.add_argument("--epochs", type=int, default=Settings.__dataclass_fields__["epochs"].default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hard", type=float, default=0.0, help="weight of the written token in the target, 0 to 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load_model(args.model, args.adapter, torch.device(args.device))
    settings = Settings(args.max_minutes, args.epochs, args.lr, args.hard)
    key = f"{Path(args.model).resolve()} {args.adapter}"
    train(model, args.data, args.out, args.num_heads, args.num_layers, args.draft_vocab, settings, key)


if __name__ == "__main__":
    main()
