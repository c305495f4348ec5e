"""What a run of the benchmark is, so that nothing is compared that was not run alike."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine, write_text
from medusa_apar.json_files import json_object
from medusa_apar.models.fingerprint import fingerprint
from medusa_apar.requests import Sampling

from .prompts import Prompt, digest
from .runs import Runs

RESULTS, SETTINGS = "results.jsonl", "settings.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is; a folder holds results of one plan only."""

    model: str
    weights: str  # fingerprint
    heads: str  # fingerprint and nodes of the draft tree; "" without heads
    dtype: str
    runtime: str  # of our own systems, and its weights
    device: str
    threads: int
    prompts: str  # digest of ids and texts
    max_new_tokens: int
    budget: int | None = None  # rows of every forest of ours; None: what pays
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    other_heads: str = ""  # as `heads`, those of the systems that draft with others

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, top_p=self.top_p)

    @property
    def decoding(self) -> str:
        """How tokens are chosen, in words."""
        return decoding(self.temperature, self.top_p)


DEFAULTS = {field.name: field.default for field in fields(Plan) if field.default is not MISSING}


def decoding_of(folder: Path) -> str:
    """How the answers that a folder holds were chosen, in words, as its settings have it."""
    found = DEFAULTS | json_object(folder / SETTINGS)
    return decoding(found["temperature"], found["top_p"])


def decoding(temperature: float, top_p: float) -> str:
    if not temperature:
        return "greedy"
    return f"sampled at temperature {temperature:g}, top-p {top_p:g}, a seed for each question and repeat"


def open_results(folder: Path, plan: Plan) -> Runs:
    """results.jsonl by (system, prompt, repeat); ValueError where the folder holds results of another plan."""
    keep_settings(folder, asdict(plan), DEFAULTS)
    return Runs(folder / RESULTS, ("system", "prompt", "repeat"))


def keep_settings(folder: Path, now: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Writes down what the results of a folder are of. ValueError where it holds results of something else.

    defaults: how what an earlier version did not write was.
    """
    settings = folder / SETTINGS
    if settings.exists():
        before = dict.fromkeys(now) | defaults | json_object(settings)
        for name, value in now.items():
            if before[name] != value:
                raise ValueError(
                    f"{folder} holds results with another {name} ({before[name]}, now {value}), which must "
                    "not be compared: give another --out"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(settings, json.dumps(now, indent=2) + "\n")


def plan_of(
    apar: MedusaApar,
    model: str,
    prompts: list[Prompt],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    other: MedusaApar | None = None,
) -> Plan:
    """sampling: temperature and top-p; None decodes greedily. other: with other heads, None without such systems."""
    sampling = Sampling() if sampling is None else sampling
    device = apar.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]
    dtype = str(apar.model.dtype).removeprefix("torch.")
    weights = fingerprint(apar.model)[:12]
    facts = apar.runtime.facts
    runtime = f"{'cpu' if facts.backend == 'cpu' else 'torch'}, {facts.kind}"
    threads = torch.get_num_threads()
    return Plan(
        *(model, weights, _heads_of(apar), dtype, runtime, name, threads, digest(prompts), max_new_tokens),
        *(apar.options.budget, sampling.temperature, sampling.top_p, "" if other is None else _heads_of(other)),
    )


def _heads_of(apar: MedusaApar) -> str:
    if apar.heads is None:
        return ""
    tree = hashlib.sha256(repr(apar.options.draft_tree.choices).encode()).hexdigest()[:8]
    return f"{apar.heads.kind} {fingerprint(apar.heads)[:12]}, {len(apar.options.draft_tree)} nodes {tree}"
