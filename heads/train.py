"""Train draft heads on a model's own answers: `medusa-apar train-heads`.

Head h at a thread's position i must match the distribution the base itself has at position i+1+h of that thread
(cross-entropy with soft targets, weighted 0.8^h); a Hydra head is given the thread's true tokens in between. The base
is frozen and its states are computed once (`answers.py`).
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.job import Job, read_checkpoint
from medusa_apar.models import head_files
from medusa_apar.models.families import end_tokens, unembedding_size
from medusa_apar.models.fingerprint import fingerprint

from . import DraftHeads, HydraHeads, MedusaHeads, load_heads
from .answers import AnswerFile, Answers, Encoder, Store, data_fingerprint, greedy
from .ask import check_same
from .held_out import HELD_OUT, by_place, by_prompt
from .losses import WINDOW, evaluate, ridge_start, window_losses
from .training_loop import STATE, Figures, LoopSettings, TrainingLoop

HEAD_DECAY = 0.8  # head h counts 0.8^h (Medusa, section 3.2)
WARMUP = 0.03  # of the run
# Residual blocks that start at zero learn slowly: 13 % top-1 of head 1 after 60 steps at 1e-3, 17 % at 5e-3.
# A ridge start needs care: after 20 steps 1e-3 is behind 3e-4 (19.7 against 21.1 % top-1 of head 3).
LEARNING_RATES = {"medusa": 5e-3, "hydra": 5e-4, "fused": 5e-4}


@dataclass(slots=True)
class Settings:
    """What a run does; those in `SHAPE` must not change when it is resumed."""

    kind: str = "medusa"  # or "hydra"
    num_heads: int = 4
    num_layers: int = 1
    draft_vocab: int | None = 8192  # 0: all ids; None: those of `init`
    aux_layers: tuple[int, ...] = ()
    init: str | None = None  # folder of heads to go on from, which then say all of the above
    start: str = "auto"  # "ridge", "zero"; auto: ridge for heads with an input layer
    max_minutes: float = 60.0  # encoding included, earlier runs too
    epochs: float = 4
    lr: float | None = None  # peak; None: by kind
    hard: float = 0.0  # weight of the token that was written; the rest is the base's distribution
    temperature: float = 1.0  # of the base's distribution: below 1 it is sharper, nearer to greedy decoding
    batch: int = 2048  # positions per step
    eval_every: int = 100  # steps
    eval_positions: int = 8192
    threads: int = 1  # single-threaded workers side by side
    seed: int = 0


SHAPE = (
    *("kind", "num_heads", "num_layers", "draft_vocab", "aux_layers", "init", "start"),
    *("lr", "hard", "temperature", "batch", "seed"),
)


class Trainer(TrainingLoop):
    """Heads that read stored states, window by window."""

    def __init__(
        self,
        heads: DraftHeads,
        store: Store,
        held_out: Answers,
        greedy: Tensor,
        out: Path,
        settings: Settings,
        job: Job,
    ) -> None:
        self.store, self.held_out, self.greedy, self.settings = store, held_out, greedy, settings
        self.windows_per_step = max(1, round(settings.batch / WINDOW))
        windows_per_epoch = math.ceil(len(store) / WINDOW)
        loop = LoopSettings(
            last_step=math.ceil(settings.epochs * windows_per_epoch / self.windows_per_step),
            max_minutes=settings.max_minutes,
            lr=settings.lr or LEARNING_RATES[heads.kind],
            warmup=WARMUP,
            betas=(0.9, 0.98),
            eval_every=settings.eval_every,
            threads=settings.threads,
        )
        super().__init__(heads, list(heads.parameters()), out, loop, job)

    def update(self, progress: float) -> list[float]:
        sums = self.take_step(self.window_starts(), self._gradients)
        return (sums[0] / sums[1].clamp(min=1)).tolist()

    def _gradients(self, start: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """A window's share of an update; losses and positions [2, heads]."""
        heads, settings = self.heads, self.settings
        part = self.store[start : start + WINDOW + heads.num_heads].to(self.device)
        with self.autocast():
            losses, counts = window_losses(heads, part, settings.hard, settings.temperature)
            weights = torch.tensor([HEAD_DECAY**head for head in range(heads.num_heads)], device=self.device)
            # Every window divides by the same number, so that short threads weigh by their positions.
            loss = (losses * weights).sum() / (WINDOW * self.windows_per_step)
        gradients = torch.autograd.grad(loss, self.parameters)
        return gradients, torch.stack([losses.detach(), counts])

    def window_starts(self) -> list[int]:
        """This step's windows. Each epoch cuts the answers at another offset; (seed, step) decides all."""
        per_step, last = self.windows_per_step, max(1, len(self.store) - self.heads.num_heads - 1)
        per_epoch = math.ceil(len(self.store) / WINDOW)
        starts = []
        for index in range(self.step * per_step, (self.step + 1) * per_step):
            epoch, place = divmod(index, per_epoch)
            generator = random.Random(f"{self.settings.seed} {epoch}")
            offset, order = generator.randrange(WINDOW), list(range(per_epoch))
            generator.shuffle(order)
            starts.append((order[place] * WINDOW + offset) % last)
        return starts

    def judge(self) -> Figures:
        with self.autocast():
            return evaluate(self.heads, self.held_out, self.greedy)


def make_heads(model: PreTrainedModel, settings: Settings, token_map: Tensor | None) -> DraftHeads:
    """New heads of the settings' kind, or those of `settings.init`: float32, on the model's device.

    token_map: the draft vocabulary; heads to go on from keep theirs where the settings say so.
    """
    if settings.init is not None:
        heads = load_heads(settings.init, model, torch.float32)
        if heads.kind not in LEARNING_RATES:
            raise ValueError(f"{settings.init} holds an {heads.kind} drafter: go on with --kind {heads.kind}")
        if isinstance(heads, MedusaHeads) and heads.unembedding is not None:
            raise ValueError(f"{settings.init} holds V1 heads, which own their unembedding: only V2 heads are trained")
        if settings.draft_vocab is not None:
            heads.propose_only(token_map)
        return heads
    vocab_size, hidden_size = unembedding_size(model)
    count, layers = settings.num_heads, settings.num_layers
    made: DraftHeads
    if settings.kind == "medusa" and not settings.aux_layers:
        made = MedusaHeads(count, layers, hidden_size, vocab_size, token_map=token_map)
    else:
        sequential = settings.kind == "hydra"
        made = HydraHeads(count, layers, hidden_size, vocab_size, token_map, settings.aux_layers, sequential)
    return made.to(model.device).attach(model)


def train(model: PreTrainedModel, file: AnswerFile, out: Path, settings: Settings, job: Job) -> DraftHeads:
    """Heads for `model`, also saved in `out`; started again with the same arguments it goes on to the same result.

    ValueError where `out` holds another run, or the records nothing to train on.
    """
    started = time.monotonic()
    check_out(out)
    (out / "train").mkdir(parents=True, exist_ok=True)
    fixed = _shape(settings) | {
        "model_fingerprint": fingerprint(model)[:16],
        "data_fingerprint": data_fingerprint(file),
    }
    state = _read_state(out, fixed)
    model.requires_grad_(False)
    eos_ids = end_tokens(model.generation_config)
    token_map = state["heads"].get("token_map") if state else _token_map(model, file, settings, eos_ids)
    heads = make_heads(model, settings, token_map)
    if settings.start == "ridge" and not isinstance(heads, HydraHeads):
        raise ValueError("start='ridge' needs heads with an input layer: Hydra, or Medusa with aux_layers")

    shards, held_out_shards = _encode(model, file, heads.aux_layers, out, eos_ids, settings, state, started, job)
    store, held_out = Store(shards), Store(held_out_shards)[: settings.eval_positions]
    job.log(
        "encoded", positions=len(store), held_out=len(held_out), minutes=round((time.monotonic() - started) / 60, 2)
    )
    job.say(f"{len(store)} positions to train on, {len(held_out)} held out")
    trainer = Trainer(heads, store, held_out, greedy(model, file, held_out), out, settings, job)
    trainer.extra = {
        "shards": [[path.name for path in paths] for paths in (shards, held_out_shards)],
        "settings": fixed,
    }
    if state:
        trainer.resume(state)
    elif isinstance(heads, HydraHeads) and settings.init is None and settings.start != "zero":
        used = ridge_start(heads, store)
        job.log("ridge", positions=used)
    trainer.seconds += time.monotonic() - started
    figures = trainer.run()
    job.report(
        records=len(file.records),
        positions=len(store),
        steps=trainer.step,
        last_step=trainer.loop.last_step,
        training_minutes=round(trainer.seconds / 60, 2),
        lr=trainer.loop.lr,
        parameters=sum(parameter.numel() for parameter in trainer.parameters),
        precision=str(trainer.product_dtype).removeprefix("torch."),
        held_out=figures,
        acceptance=heads.acceptance,
    )
    return heads


def _encode(
    model: PreTrainedModel,
    file: AnswerFile,
    aux_layers: tuple[int, ...],
    out: Path,
    eos_ids: list[int],
    settings: Settings,
    state: dict[str, Any] | None,
    started: float,
    job: Job,
) -> tuple[list[Path], list[Path]]:
    """Shards to train on and held-out ones; half of the time at most goes into the base's forward passes."""
    threads = settings.threads if model.device.type == "cpu" else 1
    encoder = Encoder(model, file, eos_ids, out / "train" / "states", aux_layers, threads)
    if state is not None:
        paths = [[encoder.folder / name for name in names] for names in state["shards"]]
        if all(path.exists() for shards in paths for path in shards):
            return paths[0], paths[1]
        raise ValueError(f"{encoder.folder} lacks hidden states that the run in {out} trains on: start anew elsewhere")
    kept, held_out = by_prompt(file, settings.eval_positions)
    if not encoder.holds(held_out) and encoder.holds(by_place(file, settings.eval_positions)[1]):
        # Hours of an earlier version's states are not thrown away.
        kept, held_out = by_place(file, settings.eval_positions)
        job.say(f"{encoder.folder} holds an earlier version's states: held out is every {HELD_OUT}th record")
    half = 30 * settings.max_minutes
    with job.bar("encoding answers", len(kept) + len(held_out)) as bar:
        held_out_shards = encoder.run(held_out, done=bar.advance)
        shards = encoder.run(kept, lambda: time.monotonic() - started < half, bar.advance)
    return shards, held_out_shards


def _token_map(model: PreTrainedModel, file: AnswerFile, settings: Settings, eos_ids: list[int]) -> Tensor | None:
    vocab_size = unembedding_size(model)[0]
    return file.draft_vocabulary(settings.draft_vocab or 0, vocab_size, eos_ids)


def _shape(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    return {name: list(values[name]) if name == "aux_layers" else values[name] for name in SHAPE}


def check_out(out: Path) -> None:
    """FileExistsError where the heads' config.json would take the place of a model's."""
    config = head_files.read_config(out)
    if (kind := config.get("model_type")) and not config.get("kind"):
        raise FileExistsError(f"{out} holds a {kind} model, whose config.json stays: choose another --out")


def _read_state(out: Path, fixed: dict[str, Any]) -> dict[str, Any] | None:
    path = out / STATE
    if not path.exists():
        return None
    state = read_checkpoint(path, ("heads", "optimizers", "step", "seconds", "shards", "settings"))
    check_same(state["settings"], fixed, f"{out} holds a run")
    return state
