"""Train an EAGLE-3 drafter on a model's own answers: `medusa-apar train-heads --kind eagle3`.

The base is frozen. It runs once over each packed row of an update, and the drafter drafts behind every place of it
(`losses.py`), so that nothing but the drafter lies on the disk.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.finetune.packing import PackedRow, join, pack_threads
from medusa_apar.job import Job, read_checkpoint, replacing
from medusa_apar.models.families import unembedding_size
from medusa_apar.models.fingerprint import fingerprint

from .. import load_heads
from ..answers import AnswerFile, data_fingerprint
from ..ask import check_same
from ..held_out import by_prompt
from .fresh import fresh
from .heads import Eagle3Heads
from .losses import RANKS, RoundLosses, round_losses
from .states import StateCache

ROUND_DECAY = 0.8  # round k counts 0.8^k: a token far ahead is seldom reached
LEARNING_RATE = 5e-4
WARMUP_STEPS = 20
STATE = "train/state.pt"
# Rounds that are trained until so much of a run is done, then all: what comes far behind a root can only be learned
# where what lies before it is, and every round costs as much as the first.
GROWTH = ((0.35, 2), (0.65, 3))


@dataclass(slots=True)
class Settings:
    """What a run does; those in `SHAPE` must not change when it is resumed.

    boundaries: of the base, whose states are fused (`files.py`); the last is where a new drafter begins to read.
    rounds: tokens drafted ahead of each place. batch: tokens of an update. row_tokens: of a packed row.
    """

    boundaries: tuple[int, ...] = ()
    draft_vocab: int = 8192  # 0: all ids
    init: str | None = None  # folder of a drafter to go on from
    rounds: int = 5
    max_minutes: float = 60.0
    epochs: float = 2
    lr: float | None = None
    batch: int = 4096
    row_tokens: int = 512
    eval_every: int = 50  # updates
    eval_positions: int = 8192
    threads: int = 1
    seed: int = 0


SHAPE = ("boundaries", "draft_vocab", "init", "rounds", "lr", "batch", "row_tokens", "seed")


class Trainer:
    """The loop, and its checkpoint in the output folder."""

    def __init__(
        self,
        heads: Eagle3Heads,
        rows: list[PackedRow],
        held_out: list[PackedRow],
        out: Path,
        settings: Settings,
        job: Job,
    ) -> None:
        self.heads, self.rows, self.held_out = heads, rows, held_out
        self.out, self.settings, self.job = out, settings, job
        # But for an embedding: tokens are read as the base reads them.
        self.parameters = [p for p in heads.network.parameters() if p is not heads.network.embedding]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.device = self.parameters[0].device
        self.peak = settings.lr or LEARNING_RATE
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.peak, betas=(0.9, 0.95), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        per_epoch = sum(map(len, rows)) / settings.batch
        self.last_step = max(1, math.ceil(settings.epochs * per_epoch))
        self.fixed: dict[str, Any] = {}
        self.product_dtype = heads.base.dtype
        self.states = StateCache(heads)
        threads = settings.threads if self.device.type == "cpu" else 1
        initialise = (lambda: torch.set_num_threads(1)) if threads > 1 else None
        self.workers = ThreadPoolExecutor(threads, initializer=initialise)

    def run(self) -> dict[str, list[float]]:
        """Trains to the end; the held-out figures after it."""
        started, before = time.monotonic(), self.seconds
        updates = self._updates()
        if self.step == 0:
            self.evaluate()
            self.save()
        for _ in range(self.step):
            next(updates)
        with self.job.bar("training", self.last_step, self.step) as bar:
            while (progress := self._progress()) < 1:
                loss = self._update(next(updates), progress)
                self.step += 1
                self.seconds = before + time.monotonic() - started
                bar.at(progress * self.last_step, f"loss {loss:.3f}")
                if self.step % self.settings.eval_every == 0:
                    self.evaluate(loss)
                    self.save()
        figures = self.evaluate()
        self.save()
        self.workers.shutdown()
        return figures

    def _progress(self) -> float:
        """By time or by steps, whichever is further."""
        return max(self.step / self.last_step, self.seconds / (60 * self.settings.max_minutes))

    def _updates(self) -> Iterator[list[PackedRow]]:
        """Rows of update after update; each epoch in an order of its own, which the seed decides."""
        epoch, group, size = 0, [], 0
        while True:
            order = list(range(len(self.rows)))
            random.Random(f"{self.settings.seed} {epoch}").shuffle(order)
            for index in order:
                group.append(self.rows[index])
                size += len(self.rows[index])
                if size >= self.settings.batch:
                    yield group
                    group, size = [], 0
            epoch += 1

    def _update(self, rows: list[PackedRow], progress: float) -> float:
        """One update; its mean loss of the first round."""
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * warm * 0.5 * (1 + math.cos(math.pi * progress))
        tokens, rounds = sum(map(len, rows)), rounds_at(progress, self.settings.rounds)
        sums = torch.zeros(2, device=self.device)
        rows = sorted(rows, key=len, reverse=True)  # so that no worker is left with a long one at the end
        for gradients, losses in self.workers.map(lambda row: self._gradients(row, tokens, rounds), rows):
            sums += torch.stack([losses.losses[0], losses.counts[0]]).detach()
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(sums[0] / sums[1].clamp(min=1))

    def _losses(self, row: PackedRow, rounds: int, ranks: int = 0) -> RoundLosses:
        states, hidden = self.states.of(row)
        row = row.to(self.device)
        counted = row.trained & ~torch.isin(row.input_ids, _eos(self.heads.base, self.device))
        with torch.autocast(self.device.type, self.product_dtype, enabled=self.product_dtype != torch.float32):
            return round_losses(self.heads, row, states.float(), hidden, counted, rounds, ranks)

    def _gradients(self, row: PackedRow, tokens: int, rounds: int) -> tuple[tuple[Tensor, ...], RoundLosses]:
        losses = self._losses(row, rounds)
        decay = ROUND_DECAY ** torch.arange(rounds, device=self.device)
        return torch.autograd.grad((decay * losses.losses).sum() / tokens, self.parameters), losses

    @torch.no_grad()
    def evaluate(self, loss: float | None = None) -> dict[str, list[float]]:
        """Held-out figures of each round, logged and said; the drafter's `acceptance` becomes what was measured."""
        parts = list(self.workers.map(lambda row: self._losses(row, self.settings.rounds, RANKS), self.held_out))
        counts = sum(part.counts for part in parts).clamp(min=1)  # type: ignore[union-attr]
        losses = sum(part.losses for part in parts) / counts
        hits = sum(part.hits for part in parts) / counts[:, None]
        self.heads.acceptance = hits.tolist()
        found = {"loss": losses, "top1": hits[:, 0], "top3": hits[:, :3].sum(1), "top5": hits[:, :5].sum(1)}
        figures = {name: [round(float(value), 4) for value in values] for name, values in found.items()}
        minutes = round(self.seconds / 60, 2)
        self.job.log("held_out", step=self.step, minutes=minutes, train_loss=loss and round(loss, 4), **figures)
        self.job.say(f"step {self.step}/{self.last_step}  {minutes:.1f} min  held out: {figures}")
        return figures

    def save(self) -> None:
        """A drafter ready for use in the output folder, and what `resume` needs."""
        self.heads.save_pretrained(self.out)
        state = {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(self.out / STATE) as temporary:
            torch.save(state | {"step": self.step, "seconds": self.seconds, "settings": self.fixed}, temporary)

    def resume(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def train(model: PreTrainedModel, file: AnswerFile, out: Path, settings: Settings, job: Job) -> Eagle3Heads:
    """A drafter for `model`, also saved in `out`; started again with the same arguments it goes on.

    ValueError where `out` holds another run, or the records nothing to train on.
    """
    (out / "train").mkdir(parents=True, exist_ok=True)
    fixed = {name: value for name, value in json.loads(json.dumps(asdict(settings))).items() if name in SHAPE}
    fixed |= {"model_fingerprint": fingerprint(model)[:16], "data_fingerprint": data_fingerprint(file)}
    state = None
    if (out / STATE).exists():
        state = read_checkpoint(out / STATE, ("heads", "optimizer", "step", "seconds", "settings"))
        check_same(state["settings"], fixed, f"{out} holds a run")
    model.requires_grad_(False)
    heads = _made(model, file, settings)
    kept, held_out = by_prompt(file, settings.eval_positions)
    rows, held = (list(_rows(file, records, settings.row_tokens)) for records in (kept, held_out))
    if not rows:
        raise ValueError("no answers to train on: every thread of the data is empty.")
    job.say(f"{sum(map(len, rows))} tokens to train on, {sum(map(len, held))} held out")
    trainer = Trainer(heads, rows, held, out, settings, job)
    trainer.fixed = fixed
    if state is not None:
        trainer.resume(state)
    figures = trainer.run()
    job.report(
        records=len(file.records),
        tokens=sum(map(len, rows)),
        steps=trainer.step,
        last_step=trainer.last_step,
        training_minutes=round(trainer.seconds / 60, 2),
        lr=trainer.peak,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        held_out=figures,
        acceptance=heads.acceptance,
    )
    return heads


def _made(model: PreTrainedModel, file: AnswerFile, settings: Settings) -> Eagle3Heads:
    """A new drafter, or that of `settings.init`; float32."""
    if settings.init is not None:
        heads = load_heads(settings.init, model, torch.float32)
        if not isinstance(heads, Eagle3Heads):
            raise ValueError(f"{settings.init} holds {heads.kind} heads, which no EAGLE-3 drafter can begin with")
        return heads
    vocab_size, hidden = unembedding_size(model)
    token_map = None
    if 0 < settings.draft_vocab < vocab_size:
        token_map = file.draft_vocabulary(settings.draft_vocab, vocab_size, _eos(model).tolist())
    boundaries = settings.boundaries or usual_boundaries(model)
    made = Eagle3Heads(fresh(model, boundaries, token_map, settings.seed), hidden, vocab_size, boundaries)
    made.check_matches(model)
    return made.to(model.device).attach(model)


def rounds_at(progress: float, rounds: int) -> int:
    """How many of so many rounds are trained when this share of a run is done."""
    return next((min(some, rounds) for until, some in GROWTH if progress < until), rounds)


def usual_boundaries(model: PreTrainedModel) -> tuple[int, ...]:
    """A low one, a middle one, and the last layer's output, from which the base says what comes next."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return min(2, layers), max(layers // 2, 1), layers


def _rows(file: AnswerFile, records: Sequence[int], row_tokens: int) -> Iterator[PackedRow]:
    """Records packed and joined into rows of at most so many tokens, where one alone is not longer."""
    waiting: list[PackedRow] = []
    for record in records:
        row = pack_threads(*file.packed_threads(record))
        if waiting and sum(map(len, waiting)) + len(row) > row_tokens:
            yield join(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield join(waiting)


def _eos(model: PreTrainedModel, device: torch.device | None = None) -> Tensor:
    """Ids behind which nothing is predicted, long."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.tensor(ids, dtype=torch.long, device=device)
