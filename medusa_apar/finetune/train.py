"""The training loop: LoRA and the control rows on trie-packed paragraph trees."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from medusa_apar.job import Job, cores, launched, read_checkpoint, replacing, slow
from medusa_apar.models.fingerprint import fingerprint

from .adapter import Losses, attach_lora, check_forward, control_rows, label_losses, save_adapter
from .corpus import Drops, Example, load_examples
from .data import EXAMPLES
from .distil import check_teaches, ending_tokens
from .forms import Forms, pack
from .lora_linear import lean_lora
from .mixture import Given, Limits, Source, draw, updates
from .packing import PackedRow, Tokens
from .settings import Schedule, Settings
from .tally import PARTS, Tally

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


class Trainer:
    """A tuned model, its optimiser and its checkpoint; `step` is one update.

    Every process of an accelerate launch takes its share of an update's rows, and gradients are summed. On a CPU, rows
    are worked on by single-threaded workers side by side: one operation split over the cores waits for the slowest
    core each time, which on a shared machine cost 16 ms an operation (17 times slower).
    """

    def __init__(
        self, tuned: PeftModel, tokens: Tokens, schedule: Schedule, settings: Settings, job: Job,
        accelerator: Accelerator, workers: int, of: dict[str, Any], ends: Tensor | None = None,
    ) -> None:  # fmt: skip
        """of: what else the run is made of (base, data, ...); a checkpoint is only taken up with the same.

        ends: `distil.ending_tokens`, where the base teaches.
        """
        rows = control_rows(tuned)
        apart = {id(row) for row in rows}
        lora = [p for p in tuned.parameters() if p.requires_grad and id(p) not in apart]
        groups = [{"params": lora, "peak": settings.lr}, {"params": rows, "peak": settings.row_lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parameters = [*lora, *rows]
        self.workers = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self.tuned, self.tokens, self.schedule, self.job = tuned, tokens, schedule, job
        self.accelerator, self.settings, self.of = accelerator, settings, of
        self.ends = None if ends is None else ends.to(accelerator.device)
        self.update = 0

    def elapsed(self) -> float:
        """Seconds by the first process's clock: replicas with clocks of their own would part, or wait for ever."""
        if self.accelerator.num_processes == 1:
            return self.job.seconds
        kind = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return float(broadcast(torch.tensor([self.job.seconds], dtype=kind, device=self.accelerator.device)))

    def step(self, rows: list[PackedRow], elapsed_s: float) -> dict[str, Any]:
        """One update on the given rows; returns what the log shows of it."""
        began = self.job.seconds
        factor = self.schedule.factor(self.update, elapsed_s)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        labels = sum(int((row.labels(of=row.trained | row.avoided) >= 0).sum()) for row in rows)
        tally = Tally()
        for gradients, losses in self._map(lambda row: self._gradients(row, labels), rows):
            tally.add(losses)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(grad, "sum")
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
            "tokens_per_second": round(tokens / max(1e-6, self.job.seconds - began), 1),
            **tally.gather(self.accelerator).means(),
        }

    def _map(self, work: Callable[[PackedRow], Result], rows: list[PackedRow]) -> Iterable[Result]:
        """Maps this process's share of the rows, the longest first, so that no worker is left with one at the end."""
        mine = sorted(rows, key=len, reverse=True)[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.workers.map(work, mine)

    def _gradients(self, row: PackedRow, labels: int) -> tuple[tuple[Tensor, ...], Losses]:
        """A row's share of an update of so many labels, and its losses."""
        losses = label_losses(self.tuned, row.to(self.accelerator.device), self.tokens, self.ends)
        settings = self.settings
        loss = losses.values.sum() + settings.unlikelihood * losses.against.sum()
        loss = loss + settings.distil * losses.from_base.sum()
        gradients = torch.autograd.grad(loss / labels, self.parameters)
        for name in ("values", "against", "from_base"):  # the graphs of an update's rows go as they are done
            setattr(losses, name, getattr(losses, name).detach())
        return gradients, losses

    def evaluate(self, rows: list[PackedRow]) -> dict[str, float | None]:
        """Held-out losses, one row an example."""
        tally = Tally()
        for losses in self._map(self._losses, rows):
            tally.add(losses)
        return tally.gather(self.accelerator).means()

    @torch.no_grad()
    def _losses(self, row: PackedRow) -> Losses:
        return label_losses(self.tuned, row.to(self.accelerator.device), self.tokens, self.ends)

    # ---- checkpoints

    @property
    def _checkpoint(self) -> Path:
        return self.job.folder / "checkpoint.pt"

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        with replacing(self._checkpoint) as partial:
            torch.save(
                {
                    "settings": json.dumps(asdict(self.settings)),
                    "of": json.dumps(self.of),
                    "weights": [parameter.detach().cpu() for parameter in self.parameters],
                    "optimizer": self.optimizer.state_dict(),
                    "update": self.update,
                    "seconds": self.job.seconds,
                },
                partial,
            )

    def resume(self) -> None:
        """Takes up the checkpoint in the output folder, if there is one; ValueError if it is of another run."""
        if not self._checkpoint.exists():
            return
        needed = ("settings", "weights", "optimizer", "update", "seconds")
        state = read_checkpoint(self._checkpoint, needed)
        ours = self.of | asdict(self.settings)
        # A run begun before a setting existed had what is its default now.
        theirs = json.loads(state.get("of", "{}")) | asdict(Settings()) | json.loads(state["settings"])
        if changed := [name for name in ours if ours[name] != theirs.get(name) and name != "max_minutes"]:
            name = changed[0]
            raise ValueError(
                f"{self.job.folder} holds a run with {name} {theirs.get(name)}, not {ours[name]}: "
                "give it another --out, or delete that folder."
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.update = state["update"]
        self.job.earlier_seconds = state["seconds"]


def finetune(
    job: Job,
    base: str,
    data: list[tuple[Path, float | None]],
    settings: Settings,
    *,
    init: Path | None = None,
    control: tuple[str, str] | None = None,
    workers: int | None = None,
    save_every: int = 20,
    evaluate_every: int = 40,
    trust_remote_code: bool = False,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """One run into the job's folder: log, checkpoint, `adapter/`, report. Started again, it goes on where it stopped.

    base: as `medusa_apar.load` takes it. data: folders of `medusa-apar data`, each with its share of the tokens.
    init: adapter to go on from. control: texts of the `[Fork]` and `[Child]` tokens; None takes the model's spare ones
    (`finetune/base.py`). workers: rows worked on at a time on a CPU, None: one a core. skip_bad: examples that cannot
    be read or that the model's chat template refuses are left out and reported; else they end the run before training.
    """
    from .base import load_base

    accelerator = launched(job.folder)
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    drops = Drops(skip_bad)
    with slow("reading the examples"):
        sources = [Source(list(load_examples(folder / EXAMPLES, drops)), share, str(folder)) for folder, share in data]
    with slow(f"loading {base}"):
        found = load_base(base, getattr(torch, settings.dtype), control, trust_remote_code)
    tokenizer, tokens = found.tokenizer, found.tokens
    digests = [_sha256(folder / EXAMPLES) for folder, _ in data]
    of: dict[str, Any] = {
        "base": found.name,
        "weights": fingerprint(found.model),
        "data": [[digest, share] for digest, (_, share) in zip(digests, data, strict=True)],
        "init": None if init is None else _adapter_sha256(init),
        "control tokens": [tokens.fork, tokens.child],
    }
    tuned = attach_lora(found.model, tokenizer, tokens, settings.rank, 2 * settings.rank, init).to(accelerator.device)
    check_forward(tuned)
    max_depth = max((example.tree.depth for source in sources for example in source.examples), default=0)
    limits = Limits(total=settings.total_tokens)
    with slow("drawing from the examples"):
        examples, held_out, given = draw(sources, tokenizer, tokens, limits, settings.seed, settings.plain_share, drops)
    if not examples:
        count = sum(len(list(source.examples)) for source in sources)
        forking = sum(bool(example.tree.forks) for source in sources for example in source.examples)
        raise ValueError(
            f"there is nothing to train on: of {count} examples {forking} fork, and none fits in {limits.example} "
            f"tokens, {limits.prompt} of them prompt{f'; left out: {drops}' if drops.counts else ''}."
        )
    groups = epochs(examples, tokenizer, tokens, settings)
    minutes = settings.max_minutes
    schedule = Schedule(len(groups), None if minutes is None else 60 * minutes, settings.warmup)
    threads = workers or (cores() if on_cpu else 1)
    ends = None
    if settings.distil:
        check_teaches(tuned)
        with slow("looking for line breaks in the vocabulary"):
            ends = ending_tokens(tokenizer, found.model, tokens)
    trainer = Trainer(tuned, tokens, schedule, settings, job, accelerator, threads, of, ends)
    trainer.resume()
    if accelerator.is_main_process and (short := _shortage(given)):
        job.say(short)
    if accelerator.is_main_process and drops.counts:
        job.say(f"left out: {drops}")
    about = {
        "examples": len(examples),
        "loops": sum(example.loops for example in examples),
        "held_out_examples": len(held_out),
        "forks": sum(int((row.input_ids == tokens.fork).sum()) for group in groups for row in group),
        "packed_tokens": sum(len(row) for group in groups for row in group),
        "updates": len(groups),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "data_sha256": {str(folder): digest for (folder, _), digest in zip(data, digests, strict=True)},
        "processes": accelerator.num_processes,
        "mixture": [side.as_row() for side in given],
        "left_out": drops.as_report(),
    }
    with lean_lora(tuned):
        first, last = _train(trainer, groups, held_out, about, save_every, evaluate_every)
    results = {**about, "updates_done": trainer.update, "held_out_before": first, "held_out": last}
    if accelerator.is_main_process:
        save_adapter(tuned, job.folder / "adapter", tokenizer, tokens, found.name, max_depth, found.added)
        job.log("end", update=trainer.update)
        job.say(_summary(first, last, job.folder / "adapter"))
        return job.report(**results)
    return results


def _train(
    trainer: Trainer,
    groups: list[list[PackedRow]],
    held_out: list[PackedRow],
    about: dict[str, Any],
    save_every: int,
    evaluate_every: int,
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Runs the updates that are left; held-out losses before the first of all and after the last.

    about: what the log's first line says of the run.
    """
    job, accelerator, schedule = trainer.job, trainer.accelerator, trainer.schedule
    first = trainer.evaluate(held_out)
    if trainer.update:
        job.say(f"going on from update {trainer.update} of {len(groups)}")
        before = (e for e in _log(job.folder) if e.get("event") == "held_out" and e.get("update") == 0)
        first = {name: loss for name, loss in next(before, first).items() if name in first}
    else:
        _tell(job, accelerator, "start", **about)
        _tell(job, accelerator, "held_out", update=0, **first)
    with job.bar("finetune", len(groups), trainer.update) as bar:
        while trainer.update < len(groups):
            elapsed = trainer.elapsed()
            if schedule.progress(trainer.update, elapsed) >= 1.0:
                break
            entry = trainer.step(groups[trainer.update], elapsed)
            _tell(job, accelerator, "update", **entry)
            bar.advance(shown=f"loss {entry['loss']}, fork {entry['fork']}, {entry['tokens_per_second']} tokens/s")
            if trainer.update % save_every == 0:
                trainer.save()
            if trainer.update % evaluate_every == 0 and trainer.update < len(groups):
                _tell(job, accelerator, "held_out", update=trainer.update, **trainer.evaluate(held_out))
    trainer.save()
    last = trainer.evaluate(held_out)
    _tell(job, accelerator, "held_out", update=trainer.update, **last)
    return first, last


def epochs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, tokens: Tokens, settings: Settings
) -> list[list[PackedRow]]:
    """The rows of every update. Each epoch draws anew in which form an answer is written."""
    forms = Forms(settings.in_line, settings.mixed)
    groups: list[list[PackedRow]] = []
    for epoch in range(math.ceil(settings.epochs)):
        rows = list(pack(examples, tokenizer, tokens, forms, random.Random(f"{settings.seed} {epoch}")))
        whole = updates(rows, settings.row_tokens, settings.update_tokens)
        left = settings.epochs - epoch
        groups += whole[: max(1, round(left * len(whole)))] if left < 1 else whole
    return groups


def _tell(job: Job, accelerator: Accelerator, event: str, **entry: Any) -> None:
    if accelerator.is_main_process:
        job.log(event, **entry)
        if event == "held_out":
            job.say(f"update {entry['update']}, held out: " + ", ".join(f"{k} {v}" for k, v in entry.items()))


def _log(folder: Path) -> list[dict[str, Any]]:
    """What the log holds; a line that a kill cut short is left out."""
    entries = []
    path = folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def _shortage(given: list[Given]) -> str:
    """A line about the sides that gave over 5 % less than they were to; "" where none did."""
    short = [
        f"{side.source} gave {side.tokens} of {round(side.wanted)} tokens of {side.side} answers"
        for side in given
        if side.tokens < 0.95 * side.wanted
    ]
    return "warning: " + "; ".join(short) if short else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _adapter_sha256(folder: Path) -> str:
    files = (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin"))
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors")
    return _sha256(found)


def _summary(first: dict[str, Any], last: dict[str, Any], adapter: Path) -> str:
    if last["loss"] is None:
        return f"no example was held out, so there is no loss to tell\n{adapter}"
    names = ("loss", *PARTS)
    change = ", ".join(f"{name} {first[name]} -> {last[name]}" for name in names)
    return f"held-out losses: {change}\nforks found {last['fork_recall']}, right {last['fork_precision']}\n{adapter}"
