"""An EAGLE-3 drafter as draft heads of a model: loading, saving, and what it has of the model."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from medusa_apar.drafting.drafter import AttendingDrafter
from medusa_apar.json_files import json_object
from medusa_apar.models.families import base_logit_scale, unembedding_size
from medusa_apar.reading import reading
from medusa_apar.runtimes.capture import aux_layer_modules
from medusa_apar.runtimes.cpu.weight_fingerprint import plain
from medusa_apar.runtimes.devices import device_of

from .. import checkpoints
from ..draft_heads import DraftHeads
from . import files, writing
from .drafter import Eagle3Drafter
from .files import Boundaries, Eagle3File
from .fresh import random_file
from .layer import Eagle3

DEPTH = 5  # tokens drafted ahead: behind these hardly one is right, and each costs a pass of the layer
# Share of places where a draft of each rank is right, [depth][rank], while nothing is measured: a guess that shapes the
# tree which is drafted; the drafter's own probabilities choose among its nodes.
USUAL = ((0.65, 0.13, 0.06, 0.03), (0.62, 0.13, 0.06), (0.6, 0.12, 0.05), (0.58, 0.11), (0.56, 0.1))


class Eagle3Heads(DraftHeads):
    """Drafts with a decoder layer of its own, which attends to all that a thread's path has written."""

    kind = "eagle3"

    def __init__(self, file: Eagle3File, hidden_size: int, vocab_size: int, boundaries: tuple[int, ...]) -> None:
        super().__init__(DEPTH, len(file.layers), hidden_size, vocab_size, file.token_map)
        self.boundaries, self.network = boundaries, Eagle3(file)
        self.acceptance = [list(ranks) for ranks in USUAL]

    @property
    def owns_unembedding(self) -> bool:
        return self.network.unembedding is not None

    @property
    def shape_key(self) -> Hashable:
        return *cast(tuple, super().shape_key), self.boundaries

    @classmethod
    def random(cls, model: PreTrainedModel, seed: int = 0) -> Eagle3Heads:
        """An untrained drafter of one layer in the model's dtype and device; the global random state is left alone."""
        vocab_size, hidden_size = unembedding_size(model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        boundaries = files.ascending_boundaries(layers)
        heads = cls(random_file(model, boundaries, seed), hidden_size, vocab_size, boundaries)
        return heads.to(device_of(model), model.dtype).attach(model)

    # ---- loading and saving

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        config: dict,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        convention: Boundaries | None = None,
    ) -> Eagle3Heads:
        """A drafter on `model` from a checkpoint's tensors and config; dtype: None is the model's.

        convention: what the config's layer ids name (`files.parse`).
        """
        file = files.parse(state, config, convention)
        vocab_size, hidden_size = unembedding_size(model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        boundaries = file.boundaries or files.default_boundaries(layers)
        if len(boundaries) != file.num_states or min(boundaries) < 0:
            raise ValueError(
                f"this drafter fuses {file.num_states} states of the base, its config does not say which, and a base "
                f"of {layers} layers has none that are usual."
            )
        heads = cls(file, hidden_size, file.config.vocab_size, boundaries)
        heads.check_matches(model)
        heads.acceptance = config.get("acceptance") or heads.acceptance
        return heads.to(device_of(model), dtype or model.dtype).attach(model)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """`model.safetensors` and `config.json`, as its authors and vLLM read them."""
        file = self.network.as_file(self.token_map, self.boundaries)
        config = writing.config(file, "eagle3", self.base_name)
        state = {name: tensor.cpu().contiguous() for name, tensor in writing.state_dict(file).items()}
        written = config | {"kind": self.kind, "acceptance": self.acceptance}
        checkpoints.write(Path(folder), state, written, dtype, "model.safetensors")

    def check_matches(self, model: PreTrainedModel) -> None:
        """ValueError if the drafter cannot sit on `model`."""
        super().check_matches(model)
        network = self.network
        if network.input_size != self.hidden_size:
            raise ValueError(
                f"this is a drafter of another model: it reads states of {network.input_size} numbers, and the model's "
                f"have {self.hidden_size}."
            )
        for name, tensor in (("an embedding", network.embedding), ("an unembedding", network.unembedding)):
            if tensor is None and network.hidden_size != self.hidden_size:
                raise ValueError(
                    f"this drafter is {network.hidden_size} wide and has not {name} of its own; the model's is "
                    f"{self.hidden_size} wide."
                )
        for boundary in self.boundaries:
            if boundary < 1:
                raise ValueError("this drafter reads the base's embeddings as a state, which is not supported.")
        aux_layer_modules(model, tuple(boundary - 1 for boundary in self.boundaries))

    # ---- drafting

    def states(self, hidden_states: Tensor, drafted: Tensor | None = None) -> Tensor:
        raise NotImplementedError(
            "an EAGLE-3 drafter attends to all that was written, so it has no guess from one hidden state alone."
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """long [...] -> [..., width], by its own embedding or the base's."""
        own = self.network.embedding
        if own is not None:  # of a token that is new to it any row does: it is never drafted
            return F.embedding(token_ids.clamp(max=len(own) - 1), own)
        embedded: Tensor = self.base.get_input_embeddings()(token_ids)
        return embedded

    def unembed(self, x: Tensor) -> Tensor:
        if self.network.unembedding is not None:
            return base_logit_scale(F.linear(x, self.network.unembedding), self.base)
        return super().unembed(x)

    def drafter(self, packing: str | None = None, kernels: bool = False) -> AttendingDrafter:  # type: ignore[override]
        make = partial(Eagle3Drafter, self, packing)
        if packing is None:
            return make()
        ends = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        weights = [*self.parameters(), *(weight for end in ends for weight in end.parameters() if plain(weight))]
        read = list({id(weight): weight for weight in weights}.values())
        return self._copies.get(("drafter", packing), read, make, bits=True)


def holds(path: Path) -> bool:
    """Whether a folder's or file's weights are an EAGLE-3 drafter's, by their names; not where they cannot be read."""
    try:
        found = [file for file in files.files_of(path) if file.suffix in (".safetensors", ".bin")]
        return any("hidden_norm" in name or "midlayer." in name for file in found for name in _names(file))
    except (OSError, ValueError):
        return False


def _names(file: Path) -> Iterable[str]:
    if file.suffix == ".safetensors":
        with reading(file), safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return _pickled(file)


def _pickled(file: Path) -> Mapping[str, Tensor]:
    with reading(file, "is no plain file of tensors"):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{file} is no plain file of tensors")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} is no plain file of tensors")
    return state


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A drafter's tensors and config."""
    state: dict[str, Tensor] = {}
    for file in files.files_of(path):
        if file.suffix == ".safetensors":
            with reading(file), safe_open(file, framework="pt") as tensors:
                state |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        else:
            state |= _pickled(file)
    config = (path if path.is_dir() else path.parent) / "config.json"
    return state, json_object(config) if config.exists() else {}
