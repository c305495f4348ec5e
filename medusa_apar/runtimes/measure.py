"""What a step of a model costs on this device by its rows, and a draft by its threads: measured once, and kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree, TreeShape
from medusa_apar.drafting.drafter import AttendingDrafter, Drafter, Heads, Reads, Written
from medusa_apar.drafting.step_cost import LearnedCost, StepCost
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.job import processor, write_text
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.models.hub import cache_dir
from medusa_apar.threads.paragraph_tree import ParagraphTree

from .devices import device_of
from .runtime import Runtime

logger = logging.getLogger(__name__)

ROWS = {"cpu": (1, 2, 4, 6, 8, 12, 16, 24, 32), "cuda": (1, 8, 16, 32, 64)}
THREADS = (1, 2, 4, 8)  # that draft
SLOTS, REPEATS = 256, 4
LONGEST = 4.0  # seconds that all of it may take by the first step's measure; a slower model is measured coarsely
COARSE, FEW_SLOTS = 4, 32  # then only every fourth size, once each, below so few slots
NODES = 8  # of a draft that is timed: a whole tree, pruned as it is in decoding, takes about as long
FILE = "step_costs.json"
ENOUGH, STALE = 200, 0.25  # steps of an engine before the file is corrected, and by how much it has to be wrong


class StepTimer:
    """Times a model's forward passes below one thread of `slots` tokens; use it inside `runtime.session()`."""

    def __init__(self, model: PreTrainedModel, runtime: Runtime, reads: Reads, slots: int = SLOTS) -> None:
        self._runtime, self._device, self._reads = runtime, device_of(model), reads
        vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
        self._trunk = ParagraphTree([number % int(vocabulary) for number in range(slots + 1)]).trunk
        self._ledger = SlotLedger(runtime.pool(None))
        self.slots = slots

    def prefill(self) -> float:
        """Seconds of feeding the slots; they are given back."""
        seconds, _ = self._forward(self.slots, 0)
        self._ledger.truncate(self._trunk, 0)
        return seconds

    def fill(self) -> None:
        self._forward(self.slots, 0)

    def written(self, threads: int) -> Written:
        """As if so many threads had the slots as their paths."""
        return Written(self._ledger.pool, [self._ledger.path_slots(self._trunk)] * threads)

    def rows(self, count: int) -> float:
        """Seconds of a root and so many nodes less one, three below each; as if nothing of it had been accepted."""
        seconds, drafted = self._forward(self.slots + 1, count - 1)
        self._ledger.pool.release(drafted)
        self._ledger.truncate(self._trunk, self.slots)
        return seconds

    def _forward(self, stop: int, nodes: int) -> tuple[float, list[int]]:
        tree = TreeShape.of((np.arange(nodes) - 3) // 3)
        segment = Segment(self._trunk, stop, draft_tree=tree, draft_tokens=[0] * nodes)
        started = time.perf_counter()
        forest = Forest([[segment]], self._ledger, self._device)
        self._runtime.step(forest, self._ledger.pool, self._reads, None)
        finish(self._device)
        return time.perf_counter() - started, forest.arrays[2][len(segment.extend_tokens) :].tolist()


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(model: PreTrainedModel, runtime: Runtime, heads: Heads | None, tree: DraftTree) -> StepCost:
    """In milliseconds, the least of a few runs; sizes take turns, so that a busy moment harms no single one. A model
    whose steps are long is measured coarsely: the first call of a large model on a CPU would wait a minute."""
    most = runtime.facts.max_nodes
    sizes = [size for size in ROWS.get(device_of(model).type, ROWS["cpu"]) if most is None or size <= most]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * SLOTS
    with runtime.session():
        drafter = None if heads is None else runtime.drafter(heads)
        reads = Reads.of(heads, drafter)
        slots, repeats = max(1, min(SLOTS, positions - max(sizes))), REPEATS
        first = StepTimer(model, runtime, reads, 1)
        first.fill()
        if first.rows(1) * len(sizes) * repeats > LONGEST:
            sizes, slots, repeats = sizes[::COARSE], min(slots, FEW_SLOTS), 1
        timer = StepTimer(model, runtime, reads, slots)
        timer.fill()
        runs: dict[tuple[str, int], Callable[[], float]] = {("rows", size): partial(timer.rows, size) for size in sizes}
        # Where steps are captured so is drafting, and costs far less than its kernels one by one.
        captured = runtime.facts.graphs and not isinstance(drafter, AttendingDrafter)
        if drafter is not None and heads is not None and len(tree) and not captured:
            some = tree.first(NODES)
            for threads in THREADS:
                written = timer.written(threads)
                runs["drafts", threads] = partial(draft, model, drafter, some, heads.input_size, written)
        runs_of = [[run() for run in runs.values()] for _ in range(repeats)]
    least = dict(zip(runs, map(min, zip(*runs_of, strict=True)), strict=True))

    def curve(kind: str) -> tuple[tuple[float, float], ...]:
        found = [(size, 1e3 * seconds) for (name, size), seconds in least.items() if name == kind]
        # More is never cheaper: where it was, something else ran.
        highest = itertools.accumulate((cost for _, cost in found), max)
        return tuple((size, round(cost, 4)) for (size, _), cost in zip(found, highest, strict=True))

    return StepCost(curve("rows"), curve("drafts"))


def draft(
    model: PreTrainedModel, drafter: Drafter | AttendingDrafter, tree: DraftTree, input_size: int, written: Written
) -> float:
    """Seconds of one draft behind the threads that have written this."""
    device, threads = device_of(model), len(written.paths)
    hidden = torch.randn(threads, input_size, device=device, dtype=model.dtype)
    roots = torch.zeros(threads, dtype=torch.long, device=device)
    started = time.perf_counter()
    if isinstance(drafter, AttendingDrafter):
        drafter.propose_behind(written, roots, tree)
    else:
        drafter.propose(hidden, roots, tree)
    finish(device)
    return time.perf_counter() - started


_measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, StepCost]] = weakref.WeakKeyDictionary()


def known_cost(model: PreTrainedModel, runtime: Runtime, heads: Heads | None, tree: DraftTree) -> StepCost:
    """What an earlier call measured for such a model on this device, else measured now: a second on a small model."""
    how = _how(model, runtime, heads, tree)
    found = _measured.setdefault(model, {})
    if how not in found:
        path, key = cache_dir() / FILE, _key(model, runtime.facts.kind, how)
        cost = _kept(path, key)
        if cost is None:
            logger.info("measuring what a step costs on this device, for %s", path)
            cost = measure(model, runtime, heads, tree)
            _keep(path, key, cost)
        found[how] = cost
    return found[how]


def keep_learned(
    model: PreTrainedModel, runtime: Runtime, heads: Heads | None, tree: DraftTree, learned: LearnedCost
) -> None:
    """Has later engines begin with what the steps of one have taught; the file is written where it says otherwise."""
    how = _how(model, runtime, heads, tree)
    _measured.setdefault(model, {})[how] = learned.cost
    if learned.steps < ENOUGH:
        return
    path, key = cache_dir() / FILE, _key(model, runtime.facts.kind, how)
    kept = _kept(path, key)
    now = (*learned.cost.curve, *learned.cost.drafts)
    pairs = [] if kept is None else zip((*kept.curve, *kept.drafts), now, strict=True)
    if any(abs(after - before) > STALE * before for (_, before), (_, after) in pairs):
        _keep(path, key, learned.cost)


def _how(model: PreTrainedModel, runtime: Runtime, heads: Heads | None, tree: DraftTree) -> tuple:
    return (
        *(runtime.facts, str(device_of(model)), torch.get_num_threads()),
        *(None if heads is None else heads.shape_key, tuple(tree.choices)),
    )


def _kept(path: Path, key: str) -> StepCost | None:
    entry = _read(path).get(key)
    try:
        return entry and StepCost(tuple(map(tuple, entry["curve"])), tuple(map(tuple, entry["drafts"])))
    except (KeyError, TypeError):  # damaged
        return None


def _keep(path: Path, key: str, cost: StepCost) -> None:
    known = _read(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(known | {key: {"curve": cost.curve, "drafts": cost.drafts}}, indent=1) + "\n")
    except OSError as error:
        logger.info("step costs are not kept: %s", error)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(model: PreTrainedModel, kind: str, how: tuple) -> str:
    device = device_of(model)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr((shapes, how, torch.__version__)).encode()).hexdigest()[:16]
    return f"{type(model).__name__} {kind} on {hardware}, {digest}"
