"""Train an EAGLE-3 drafter on a model's own answers: `medusa-apar train-heads --kind eagle3`.

The base is frozen. It runs once over each packed row, whose states are kept while there is room (`states.py`), and the
drafter drafts behind every place of it (`losses.py`). Nothing but the drafter lies on the disk.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.finetune.packing import PackedRow, join, pack_threads
from medusa_apar.job import Job, launched, read_checkpoint
from medusa_apar.models.families import end_tokens, unembedding_size
from medusa_apar.models.fingerprint import fingerprint

from .. import load_heads
from ..answers import AnswerFile, data_fingerprint
from ..ask import check_same
from ..held_out import by_prompt
from ..training_loop import STATE, Figures, LoopSettings, TrainingLoop, adam
from .files import ascending_boundaries
from .fresh import fresh
from .heads import Eagle3Heads
from .losses import RANKS, RoundLosses, round_losses
from .states import StateCache

ROUND_DECAY = 0.8  # round k counts 0.8^k: a token far ahead is seldom reached
LEARNING_RATE = 5e-4
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
    draft_vocab: int | None = 8192  # 0: all ids; None: those of `init`
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


class Trainer(TrainingLoop):
    """A drafter that drafts behind every place of packed rows."""

    def __init__(
        self,
        heads: Eagle3Heads,
        rows: list[PackedRow],
        held_out: list[PackedRow],
        out: Path,
        settings: Settings,
        job: Job,
    ) -> None:
        self.rows, self.held_out, self.settings = rows, held_out, settings
        processes = launched(out).num_processes
        # But for an embedding: tokens are read as the base reads them.
        parameters = [p for p in heads.network.parameters() if p is not heads.network.embedding]
        for parameter in parameters:
            parameter.requires_grad_(True)
        tokens = sum(map(len, rows))
        # Each process needs a row of every update, however few tokens that is to have.
        per_epoch = tokens / max(settings.batch, processes * tokens / len(rows))
        loop = LoopSettings(
            last_step=max(1, math.ceil(settings.epochs * per_epoch)),
            max_minutes=settings.max_minutes,
            lr=settings.lr or LEARNING_RATE,
            warmup=0.0,
            betas=(0.9, 0.95),
            eval_every=settings.eval_every,
            threads=settings.threads,
        )
        super().__init__(heads, parameters, out, loop, job)
        self.drafter, self.states = heads, StateCache(heads, processes)
        self._updates = self._drawn()

    def optimizers_of(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, its steps as long as Adam's (arXiv 2502.16982, section 2.2); Adam for norms,
        biases and an unembedding. heads/TRAINING.md has what that brings."""
        unembedding = cast(Eagle3Heads, self.heads).network.unembedding
        matrices = [each for each in parameters if each.dim() == 2 and each is not unembedding]
        others = [each for each in parameters if each.dim() != 2 or each is unembedding]
        muon = torch.optim.Muon(matrices, lr=self.loop.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return [muon, adam(others, self.loop)]

    def run(self) -> Figures:
        for _ in range(self.step):  # of earlier runs
            next(self._updates)
        return super().run()

    def _drawn(self) -> Iterator[list[PackedRow]]:
        """Rows of update after update; each epoch in an order of its own, which the seed decides."""
        epoch, group, size = 0, [], 0
        while True:
            order = list(range(len(self.rows)))
            random.Random(f"{self.settings.seed} {epoch}").shuffle(order)
            for index in order:
                group.append(self.rows[index])
                size += len(self.rows[index])
                if size >= self.settings.batch and len(group) >= self.accelerator.num_processes:
                    yield group
                    group, size = [], 0
            epoch += 1

    def update(self, progress: float) -> list[float]:
        rows = next(self._updates)
        tokens, rounds = sum(map(len, rows)), rounds_at(progress, self.settings.rounds)
        rows = sorted(rows, key=len, reverse=True)  # so that no worker is left with a long one at the end
        counted = self.take_step(self.share(rows), lambda row: self._gradients(row, tokens, rounds))
        return (counted[0] / counted[1].clamp(min=1)).tolist()

    def _losses(self, row: PackedRow, rounds: int, ranks: int = 0) -> RoundLosses:
        states, hidden = self.states.of(row)
        row = row.to(self.device)
        counted = row.trained & ~torch.isin(row.input_ids, _eos(self.heads.base, self.device))
        with self.autocast():
            return round_losses(self.drafter, row, states.float(), hidden, counted, rounds, ranks)

    def _gradients(self, row: PackedRow, tokens: int, rounds: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """A row's share of an update of so many tokens; losses and places [2, rounds]."""
        found = self._losses(row, rounds)
        decay = ROUND_DECAY ** torch.arange(rounds, device=self.device)
        gradients = torch.autograd.grad((decay * found.losses).sum() / tokens, self.parameters)
        return gradients, torch.stack([found.losses.detach(), found.counts])

    @torch.no_grad()  # of this thread, which is not the workers'
    def _judged(self, row: PackedRow) -> RoundLosses:
        return self._losses(row, self.settings.rounds, RANKS)

    def judge(self) -> Figures:
        """Figures of each round."""
        rows = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        rounds = self.settings.rounds
        sums = torch.zeros(rounds, 2 + RANKS, device=self.device)
        for part in self.workers.map(self._judged, rows):
            sums += torch.cat([part.losses[:, None], part.counts[:, None], part.hits], dim=1)
        sums = self.total(sums)
        counts = sums[:, 1].clamp(min=1)
        hits = sums[:, 2:] / counts[:, None]
        self.heads.acceptance = hits.tolist()
        found = {"loss": sums[:, 0] / counts, "top1": hits[:, 0]}
        found |= {"top3": hits[:, :3].sum(1), "top5": hits[:, :5].sum(1)}
        return {name: values.tolist() for name, values in found.items()}


def check_torch() -> None:
    """NotImplementedError with a torch that lacks Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise NotImplementedError(f"an EAGLE-3 drafter is trained with torch 2.9 or newer; this is {torch.__version__}")


def train(model: PreTrainedModel, file: AnswerFile, out: Path, settings: Settings, job: Job) -> Eagle3Heads:
    """A drafter for `model`, also saved in `out`; started again with the same arguments it goes on.

    ValueError where `out` holds another run, or the records nothing to train on; NotImplementedError as `check_torch`.
    """
    check_torch()
    (out / "train").mkdir(parents=True, exist_ok=True)
    fixed = {name: value for name, value in json.loads(json.dumps(asdict(settings))).items() if name in SHAPE}
    fixed["processes"] = launched(out).num_processes  # which share the draw
    fixed |= {"model_fingerprint": fingerprint(model)[:16], "data_fingerprint": data_fingerprint(file)}
    state = None
    if (out / STATE).exists():
        state = read_checkpoint(out / STATE, ("heads", "optimizers", "step", "seconds", "settings"))
        check_same(state["settings"], fixed, f"{out} holds a run")
    model.requires_grad_(False)
    heads = _made(model, file, settings)
    kept, held_out = by_prompt(file, settings.eval_positions)
    rows, held = (list(_rows(file, records, settings.row_tokens)) for records in (kept, held_out))
    if not rows:
        raise ValueError("no answers to train on: every thread of the data is empty.")
    job.say(f"{sum(map(len, rows))} tokens to train on, {sum(map(len, held))} held out")
    trainer = Trainer(heads, rows, held, out, settings, job)
    trainer.extra = {"settings": fixed}
    if state is not None:
        trainer.resume(state)
    figures = trainer.run()
    job.report(
        records=len(file.records),
        tokens=sum(map(len, rows)),
        steps=trainer.step,
        last_step=trainer.loop.last_step,
        training_minutes=round(trainer.seconds / 60, 2),
        lr=trainer.loop.lr,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        processes=trainer.accelerator.num_processes,
        held_out=figures,
        acceptance=heads.acceptance,
    )
    return heads


def _made(model: PreTrainedModel, file: AnswerFile, settings: Settings) -> Eagle3Heads:
    """A new drafter, or that of `settings.init`; float32."""
    vocab_size, hidden = unembedding_size(model)
    token_map = file.draft_vocabulary(settings.draft_vocab or 0, vocab_size, _eos(model).tolist())
    if settings.init is not None:
        heads = load_heads(settings.init, model, torch.float32)
        if not isinstance(heads, Eagle3Heads):
            raise ValueError(f"{settings.init} holds {heads.kind} heads, which no EAGLE-3 drafter can begin with")
        if settings.draft_vocab is not None:
            heads.propose_only(token_map)
        return heads
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    boundaries = settings.boundaries or ascending_boundaries(layers)
    made = Eagle3Heads(fresh(model, boundaries, token_map, settings.seed), hidden, vocab_size, boundaries)
    made.check_matches(model)
    return made.to(model.device).attach(model)


def rounds_at(progress: float, rounds: int) -> int:
    """How many of so many rounds are trained when this share of a run is done."""
    return next((min(some, rounds) for until, some in GROWTH if progress < until), rounds)


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
    return torch.tensor(end_tokens(model.generation_config), dtype=torch.long, device=device)
