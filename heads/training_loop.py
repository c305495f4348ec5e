"""The loop that trains heads of every kind: updates until steps or time are used up, figures, a checkpoint."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from medusa_apar.job import Job, replacing

from .draft_heads import DraftHeads

STATE = Path("train") / "state.pt"
WARMUP_STEPS = 20  # Adam's first steps are all at full length, and would undo a good start

Work = TypeVar("Work")
Figures = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How a run goes.

    last_step: after which it ends, if its time has not ended before. warmup: share of the run that the rate takes to
    its peak, `WARMUP_STEPS` at least. betas: Adam's. threads: single-threaded workers side by side, on a CPU.
    """

    last_step: int
    max_minutes: float
    lr: float
    warmup: float
    betas: tuple[float, float]
    eval_every: int
    threads: int


def adam(parameters: Sequence[nn.Parameter], loop: LoopSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=loop.lr, betas=loop.betas, weight_decay=0.0)


class TrainingLoop(ABC):
    """Updates of `parameters` in float32, with products in the base's dtype.

    Under `accelerate launch` each process takes a share of an update's work, and gradients are summed; the first one
    alone writes. On a CPU, workers take pieces side by side, each with a thread of its own: an
    operation that is split over the cores waits for the slowest of them each time.
    """

    def __init__(
        self, heads: DraftHeads, parameters: Sequence[nn.Parameter], out: Path, loop: LoopSettings, job: Job
    ) -> None:
        self.heads, self.parameters, self.out, self.loop, self.job = heads, list(parameters), out, loop, job
        self.accelerator = Accelerator()
        self.device = self.parameters[0].device
        self.optimizers = self.optimizers_of(self.parameters)
        self.step, self.seconds = 0, 0.0  # done so far, earlier runs included
        self.extra: dict[str, Any] = {}  # goes into the checkpoint
        self.product_dtype = heads.base.dtype
        threads = loop.threads if self.device.type == "cpu" else 1
        initialise = (lambda: torch.set_num_threads(1)) if threads > 1 else None
        self.workers = ThreadPoolExecutor(threads, initializer=initialise)

    def optimizers_of(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Whose groups all have the loop's rate."""
        return [adam(parameters, self.loop)]

    @abstractmethod
    def update(self, progress: float) -> list[float]:
        """One update; its losses."""

    @abstractmethod
    def judge(self) -> Figures:
        """Held-out figures; the heads' `acceptance` becomes what was measured."""

    @property
    def alone(self) -> bool:
        processes: int = self.accelerator.num_processes
        return processes == 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        main: bool = self.accelerator.is_main_process
        return main

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.product_dtype, enabled=self.product_dtype != torch.float32)

    def run(self) -> Figures:
        """Trains to the end; the held-out figures after it."""
        started, before = time.monotonic(), self.seconds
        if self.step == 0:
            self._evaluate()
            self.save()  # which data it is trained on is settled from here on
        with self.job.bar("training", self.loop.last_step, self.step) as bar:
            while (progress := self._progress()) < 1:
                self._set_rate(progress)
                losses = self.update(progress)
                self.step += 1
                self.seconds = before + time.monotonic() - started
                bar.at(progress * self.loop.last_step, f"loss {sum(losses) / len(losses):.3f}")
                if self.step % self.loop.eval_every == 0:
                    self._evaluate(losses)
                    self.save()
        figures = self._evaluate()
        self.save()
        self.workers.shutdown()
        return figures

    def take_step(
        self, work: Iterable[Work], gradients_of: Callable[[Work], tuple[tuple[Tensor, ...], Tensor]]
    ) -> Tensor:
        """One step down the gradients of all pieces of work, each process having its own; what was counted of them.

        gradients_of: of a piece, the gradients of `parameters`, and what is counted, tensors of one shape.
        """
        counted: Tensor | None = None
        for gradients, count in self.workers.map(gradients_of, work):
            counted = count if counted is None else counted + count
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        assert counted is not None
        if not self.alone:
            for parameter in self.parameters:
                assert parameter.grad is not None  # each process has a piece
                parameter.grad = self.total(parameter.grad)
            counted = self.total(counted)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return counted

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor if self.alone else self.accelerator.reduce(tensor, "sum")

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """This process's pieces. ValueError where there are fewer than processes: one would have nothing to add."""
        if len(work) < self.accelerator.num_processes:
            raise ValueError(f"{len(work)} pieces of work do not go round {self.accelerator.num_processes} processes")
        return work[self.accelerator.process_index :: self.accelerator.num_processes]

    def _progress(self) -> float:
        """The share of the run that is done, by time or by steps, whichever is further: the cosine ends with it."""
        done = max(self.step / self.loop.last_step, self.seconds / (60 * self.loop.max_minutes))
        if self.alone:
            return done
        # By the first process's clock: replicas with clocks of their own would part, or wait for ever.
        own = torch.tensor([done if self.first else 0.0], dtype=torch.float32, device=self.device)
        return float(self.total(own))

    def _set_rate(self, progress: float) -> None:
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        if self.loop.warmup:
            warm = min(warm, (progress + 1e-3) / self.loop.warmup)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.loop.lr * warm * 0.5 * (1 + math.cos(math.pi * progress))

    def _evaluate(self, losses: list[float] | None = None) -> Figures:
        """Held-out figures, logged and said; `losses` are the last update's."""
        found = self.judge()
        figures = {name: [round(value, 4) for value in values] for name, values in found.items()}
        rounded, minutes = losses and [round(value, 4) for value in losses], round(self.seconds / 60, 2)
        self.job.log("held_out", step=self.step, minutes=minutes, train_loss=rounded, **figures)
        self.job.say(f"step {self.step}/{self.loop.last_step}  {minutes:.1f} min  held out: {figures}")
        return found

    def save(self) -> None:
        """Heads ready for use in the output folder, and what `resume` needs."""
        if not self.first:
            return
        self.heads.save_pretrained(self.out)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"heads": self.heads.state_dict(), "optimizers": optimizers}
        with replacing(self.out / STATE) as temporary:
            torch.save(state | {"step": self.step, "seconds": self.seconds, **self.extra}, temporary)

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.heads.load_state_dict(state["heads"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.step, self.seconds = state["step"], state["seconds"]
