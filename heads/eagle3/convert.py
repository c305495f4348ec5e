"""An EAGLE-3 drafter of any layout into one that other engines read: `medusa-apar convert --to eagle3|speculators`.

Tensors are renamed and never recomputed. One may be added: an engine that finds a truncated draft vocabulary and no
unembedding takes the base's whole one, so the base's rows are written along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_apar.models.base_model import Base
from medusa_apar.models.head_files import FILES, FULL_MODEL_FILES
from medusa_apar.reading import expanded, reading

from .. import checkpoints
from ..layouts import check_free, draft_rows
from . import writing
from .files import Eagle3File, parse
from .heads import read
from .writing import Layout

FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Summary:
    """One line about a drafter that was read or written."""

    layout: str
    file: Eagle3File
    bytes: int
    path: Path

    def __str__(self) -> str:
        file = self.file
        layers = f"{len(file.layers)} layer{'s' if len(file.layers) > 1 else ''}"
        states = "the usual states" if file.boundaries is None else f"the states behind layers {list(file.boundaries)}"
        rows = f"draft vocabulary {file.draft_vocab_size} of {file.config.vocab_size}"
        unembedding = "its own unembedding" if file.unembedding is not None else "the base's unembedding"
        parts = [f"{self.layout} drafter", layers, states, rows, unembedding, f"{self.bytes:,} bytes", str(self.path)]
        return ", ".join(parts)


def convert(
    source: str | Path,
    to: Layout,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Summary, Summary, list[str]]:
    """The drafter of `source` (folder, file or Hub id) in layout `to`, written into folder `out`.

    base: the model that it drafts for, whose rows it gets where it has no unembedding, and which speculators' config
        names; None: as its own config says. The other parameters and errors are those of `heads.convert.convert`.
    """
    folder, path = expanded(out), checkpoints.locate(source)
    state, said = read(path)
    with reading(source, "cannot be converted"):
        file = parse(state, said)
    check_free(folder, (*FILES, *FULL_MODEL_FILES), force)
    name, notes = base or _base_name(said), []
    if to == "speculators" and not name:
        raise ValueError("name the base model with --base: speculators' config has to, and the drafter's does not.")
    written = file
    if file.unembedding is None and file.token_map is not None:
        if not name:
            raise ValueError(
                "name the base model with --base: rows of its unembedding are written along, and the drafter's config "
                "does not say which it is."
            )
        written = replace(file, unembedding=_rows_of(Base(name, trust_remote_code), file, file.token_map))
        notes.append(
            "lm_head.weight is written along: rows of the base's unembedding, which other engines would take whole."
        )
    notes += _not_read_elsewhere(file)
    tensors = {key: tensor.contiguous() for key, tensor in writing.state_dict(written, to).items()}
    kept = {key: said[key] for key in ("acceptance",) if said.get(key)}
    checkpoints.write(folder, tensors, writing.config(written, to, name) | kept, dtype, FILE)
    layout = "speculators" if "speculators_model_type" in said else "eagle3"
    return Summary(layout, file, _size(state), Path(source)), Summary(to, written, _size(tensors, dtype), folder), notes


def _base_name(config: Mapping[str, Any]) -> str:
    """The base as a drafter's config names it, "" where it does not."""
    described = config.get("speculators_config")
    verifier = described.get("verifier") if isinstance(described, Mapping) else None
    named = verifier.get("name_or_path") if isinstance(verifier, Mapping) else config.get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


def _rows_of(base: Base, file: Eagle3File, token_map: Tensor) -> Tensor:
    """[draft vocabulary, H] of the base's unembedding, in the drafter's dtype. ValueError: it is another model's."""
    unembedding = base.unembedding
    if unembedding.shape[1] != file.hidden_size:
        raise ValueError(
            f"this drafter is {file.hidden_size} wide and the unembedding of {base.name} {unembedding.shape[1]}: it "
            "drafts for another model."
        )
    return draft_rows(unembedding, token_map).to(file.norm.dtype)


def _not_read_elsewhere(file: Eagle3File) -> list[str]:
    """A sentence for what vLLM 0.32 has no place for."""
    foreign = {"fc.bias": file.fc_bias, "a bias of o_proj": file.layers[0].get("self_attn.o_proj.bias")}
    words = "vLLM does not load this drafter: it has no place for"
    return [f"{words} {name}." for name, tensor in foreign.items() if tensor is not None]


def _size(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    return sum(
        tensor.numel() * (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size())
        for tensor in state.values()
    )
