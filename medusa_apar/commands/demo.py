"""`medusa-apar demo`: an answer written by several threads at once, and what that gains over transformers alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from medusa_apar.display.terminal import Lanes, Milestones, answer_text
from medusa_apar.events import Consumer, Event
from medusa_apar.generate import MedusaApar
from medusa_apar.job import slow
from medusa_apar.models.chat import encode
from medusa_apar.runtimes.devices import device_of
from medusa_apar.threads.fork_policy import fork_mode

QUESTION = "What are the key skills of a good leader?"
WARM_UP_TOKENS = 8


class Printer(TextStreamer):
    """Prints the answer as it becomes readable; its first text ends what `waiting` holds. Of a call that fails before
    that, nothing is printed, while transformers' streamer would end a line."""

    def __init__(self, tokenizer: Any, waiting: ExitStack) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._waiting, self._begun = waiting, False

    def put(self, value: Any) -> None:
        self._begun = self._begun or not self.next_tokens_are_prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._waiting.close()
        if self._begun:
            super().on_finalized_text(text, stream_end)


@dataclass(slots=True)
class Run:
    """One generate call: what came out and what it took."""

    ids: list[int]  # visible tokens, a final end token included
    text: str
    seconds: float  # of the whole call, prefill included, drawing excluded
    steps: int
    threads: int = 1
    peak_threads: int = 1
    forks: int = 0
    output: Any = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds


def run_apar(
    apar: MedusaApar, inputs: dict, options: dict, events: Consumer | None = None, streamer: Any = None
) -> Run:
    """`options`: of `apar.generate`."""
    drawing = 0.0

    def timed(event: Event) -> None:
        nonlocal drawing
        assert events is not None
        started = time.perf_counter()
        events(event)
        drawing += time.perf_counter() - started

    started = time.perf_counter()
    output = apar.generate(
        **inputs,
        **options,
        events=timed if events else None,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - started - drawing
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Run(
        ids=ids,
        text=decode(apar, ids),
        seconds=seconds,
        steps=output.stats.steps,
        threads=len(output.paragraph_tree[0].threads),
        peak_threads=output.stats.peak_threads,
        forks=output.stats.forks,
        output=output,
    )


def run_baseline(apar: MedusaApar, inputs: dict, options: dict) -> Run:
    """transformers' own generate of the same weights, its control tokens suppressed: the details come in line."""
    options = dict(options)
    options.pop("fork")
    if (seed := options.pop("seed", None)) is not None:
        torch.manual_seed(seed)
    if control := apar.control_token_ids:
        options["suppress_tokens"] = [control.fork_id, control.child_id]
    model: Any = apar.model
    started = time.perf_counter()
    sequences = model.generate(**inputs, **options)
    ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - started
    return Run(ids=ids, text=decode(apar, ids), seconds=seconds, steps=len(ids))


def decode(apar: MedusaApar, ids: list[int]) -> str:
    tokenizer: Any = apar.tokenizer
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def prompt(apar: MedusaApar, question: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device_of(apar.model)) for name, tensor in encode(apar.tokenizer, question).items()}


def warm_up(run: Callable[..., Run], apar: MedusaApar, inputs: dict, options: dict) -> None:
    run(apar, inputs, {**options, "max_new_tokens": min(WARM_UP_TOKENS, options["max_new_tokens"])})


def demo(apar: MedusaApar, question: str, options: dict, baseline: bool, console: Console) -> tuple[Run, Run | None]:
    """Shows the threads, the answer and the table on `console`."""
    inputs = prompt(apar, question)
    console.print(Text(f"> {question}\n", style="bold"))
    mode = fork_mode(options["fork"])
    if mode == "off" or (mode == "auto" and apar.control_token_ids is None):
        console.print("Forking is off: the answer has one thread.\n", style="yellow")
    with slow("warming up"):
        warm_up(run_apar, apar, inputs, options)
    with (Lanes if console.is_terminal else Milestones)(console, apar.tokenizer) as watching:
        ours, plain = run_apar(apar, inputs, options, watching), None
    answer = answer_text(apar.tokenizer, ours.output.recording)
    console.print("\n", answer, "\n", sep="", soft_wrap=not console.is_terminal)
    if baseline:
        console.print("The same tuned model with transformers' own generate ...", style="dim")
        warm_up(run_baseline, apar, inputs, options)
        plain = run_baseline(apar, inputs, options)
    console.print(table(apar, ours, plain))
    return ours, plain


def table(apar: MedusaApar, ours: Run, plain: Run | None) -> Table:
    runs = [ours] if plain is None else [ours, plain]
    model = apar.model
    found = Table(title=f"{_dtype(model)} on {_device(model)}", title_style="dim")
    if apar.runtime.facts.kind != _dtype(model):
        found.title = f"{apar.runtime.facts.kind} weights, transformers' in {found.title}"
    found.add_column()
    found.add_column("medusa-apar", justify="right", style="bold")
    if plain is not None:
        found.add_column("transformers", justify="right")
    found.add_row("tokens per second", *(f"{run.tokens_per_second:.1f}" for run in runs))
    found.add_row("tokens", *(str(len(run.ids)) for run in runs))
    found.add_row("seconds", *(f"{run.seconds:.2f}" for run in runs))
    found.add_row("steps", *(str(run.steps) for run in runs))
    found.add_row("tokens per step", *(f"{len(run.ids) / run.steps:.2f}" for run in runs))
    found.add_row("threads", *(_threads(run) for run in runs))
    if plain is not None:
        found.caption = f"{ours.tokens_per_second / plain.tokens_per_second:.2f} times the tokens per second"
    return found


def _threads(run: Run) -> str:
    return str(run.threads) if run.threads == 1 else f"{run.threads} ({run.peak_threads} at once)"


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _device(model: Any) -> str:
    device = device_of(model)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def as_json(apar: MedusaApar, ours: Run, plain: Run | None) -> dict[str, Any]:
    return {
        "text": ours.text,
        "tokens": len(ours.ids),
        "steps": ours.steps,
        "threads": ours.threads,
        "forks": ours.forks,
        "tokens_per_second": ours.tokens_per_second,
        "baseline_tokens_per_second": plain and plain.tokens_per_second,
        "speedup": plain and ours.tokens_per_second / plain.tokens_per_second,
        "weights": apar.runtime.facts.kind,
        "baseline_weights": plain and _dtype(apar.model),
    }
