"""An EAGLE-3 drafter of any layout into one that other engines read: `medusa-apar convert --to eagle3|speculators`.

Tensors are renamed and never recomputed. What another engine would get wrong in silence is put right on the way: it
takes the base's whole unembedding where a draft vocabulary has none, so the base's rows are written along; it hands
states out in ascending order; and it adds all biases of attention or none.
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
from ..layouts import check_free, draft_rows, source_path
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
    source_path(source)
    folder, path = expanded(out), checkpoints.locate(source)
    state, said = read(path)
    with reading(source, "cannot be converted"):
        file = parse(state, said)
    check_free(folder, (*FILES, *FULL_MODEL_FILES), force)
    name, notes = base or _base_name(said), []
    if to == "speculators" and not name:
        raise ValueError("name the base model with --base: speculators' config has to, and the drafter's does not.")
    written = _with_whole_biases(_ascending(file))
    if file.unembedding is None and file.token_map is not None:
        if not name:
            raise ValueError(
                "name the base model with --base: rows of its unembedding are written along, and the drafter's config "
                "does not say which it is."
            )
        written = replace(written, unembedding=_rows_of(Base(name, trust_remote_code), file, file.token_map))
        notes.append(
            "lm_head.weight is written along: rows of the base's unembedding, which other engines would take whole."
        )
    notes += refused_by_vllm(file)
    tensors = {key: tensor.contiguous() for key, tensor in writing.state_dict(written, to).items()}
    kept = {key: said[key] for key in ("acceptance",) if said.get(key)}
    checkpoints.write(folder, tensors, writing.config(written, to, name) | kept, dtype, FILE)
    for other in [folder / each for each in (*FILES, *FULL_MODEL_FILES) if each != FILE]:
        other.unlink(missing_ok=True)  # of an earlier drafter, which would be read with it
    for other in [*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model-*.bin")]:
        other.unlink()
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


def _ascending(file: Eagle3File) -> Eagle3File:
    """The same drafter with its states in ascending order, as vLLM hands them out: columns change places.

    ValueError where one state is fused twice, which vLLM hands out once.
    """
    if file.boundaries is None or file.fc is None or list(file.boundaries) == sorted(set(file.boundaries)):
        return file
    if len(set(file.boundaries)) < len(file.boundaries):
        raise ValueError(f"this drafter fuses a state twice ({list(file.boundaries)}), which no other engine does.")
    order = sorted(range(file.num_states), key=file.boundaries.__getitem__)
    width = file.fc.shape[1] // file.num_states
    columns = torch.cat([torch.arange(place * width, (place + 1) * width) for place in order])
    return replace(
        file,
        fc=file.fc[:, columns],
        input_norm=None if file.input_norm is None else file.input_norm[columns],
        state_norms=[file.state_norms[place] for place in order] if file.state_norms else [],
        boundaries=tuple(file.boundaries[place] for place in order),
    )


def _with_whole_biases(file: Eagle3File) -> Eagle3File:
    """Zeros where a Llama's layer has some biases and lacks others: vLLM adds all or none, whatever lies there."""
    if writing.model_type(file) != "llama" or not writing.biased(file):
        return file
    layers = []
    for layer in file.layers:
        weights = {f"self_attn.{name}_proj": layer[f"self_attn.{name}_proj.weight"] for name in "qkvo"}
        zeros = {f"{name}.bias": weight.new_zeros(len(weight)) for name, weight in weights.items()}
        layers.append(zeros | layer)
    return replace(file, layers=layers)


def refused_by_vllm(file: Eagle3File) -> list[str]:
    """A sentence for what vLLM 0.32 has no place for."""
    foreign = {"fc.bias": file.fc_bias}
    if writing.model_type(file) == "qwen3":
        foreign["a bias of o_proj"] = file.layers[0].get("self_attn.o_proj.bias")
    words = "vLLM does not load this drafter: it has no place for"
    return [f"{words} {name}." for name, tensor in foreign.items() if tensor is not None]


def _size(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    return sum(
        tensor.numel() * (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size())
        for tensor in state.values()
    )
