"""An EAGLE-3 drafter as draft heads of a model: what the engine asks of it, and its files."""

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

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Attend, AttendingDrafter, Keep, Written
from medusa_apar.json_files import json_object
from medusa_apar.models.families import base_logit_scale, unembedding_size
from medusa_apar.reading import reading
from medusa_apar.runtimes.capture import aux_layer_modules
from medusa_apar.runtimes.cpu.weight_fingerprint import plain
from medusa_apar.runtimes.devices import device_of

from .. import checkpoints
from ..draft_heads import DraftHeads, tree_tensors
from ..weight_copies import DraftRows
from . import files
from .files import Boundaries, Eagle3File
from .layer import Eagle3

MOST_BYTES = 1 << 28  # of paths' keys and values that one draft gathers
DEPTH = 5  # tokens drafted ahead: behind these hardly one is right, and each costs a pass of the layer
# Share of places where a draft of each rank is right, [depth][rank], while nothing is measured: about what the authors
# report for chat (arXiv 2503.01840, figure 6); it shapes the tree that is drafted, and the drafter's own probabilities
# choose among its nodes.
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
        config = file.config
        written = {
            "kind": self.kind,
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.boundaries), "use_aux_hidden_state": True},
            "eagle_aux_hidden_state_layer_ids": list(self.boundaries),
            files.OWN_BOUNDARIES: list(self.boundaries),
            "draft_vocab_size": file.draft_vocab_size,
            "norm_before_residual": file.norm_before_residual,
            "norm_output": file.norm_output,
            "norm_before_fc": file.input_norm is not None,
            "fc_norm": bool(file.state_norms),
            "tie_word_embeddings": False,
            "acceptance": self.acceptance,
        }
        names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        names += ["head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_parameters"]
        written |= {name: getattr(config, name) for name in names}
        if getattr(config, "target_hidden_size", None) is not None:
            written["target_hidden_size"] = config.target_hidden_size
        state = {name: tensor.cpu().contiguous() for name, tensor in files.state_dict(file).items()}
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
        return self.base.get_input_embeddings()(token_ids)

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


class Eagle3Drafter:
    """Drafts level by level; a level's rows see their path and the nodes above them. It is its own `layers`.

    packing: weight format of the CPU runtime, whose code multiplies then; None multiplies in torch.
    """

    def __init__(self, heads: Eagle3Heads, packing: str | None = None) -> None:
        self._heads, self._unembed = heads, heads.unembed
        self.network = heads.network if packing is None else heads.network.packed(packing)
        self.boundaries, self.num_layers = heads.boundaries, heads.num_layers
        self.key: Hashable = (type(self), packing, tuple(weight.data_ptr() for weight in heads.parameters()))
        if packing is not None:
            weight = heads.network.unembedding
            rows = DraftRows(weight, None) if weight is not None else None
            if rows is None and heads.token_map is not None:
                rows = heads.draft_rows(bits=True)
            if rows is not None:
                self._panels = rows.panels(packing)
                self._unembed = self._packed_unembed

    @property
    def layers(self) -> Eagle3Drafter:
        return self

    def fuse(self, states: Tensor) -> Tensor:
        return self.network.fuse(states)

    def extend(self, input_ids: Tensor, features: Tensor, positions: Tensor, attend: Attend, keep: Keep) -> None:
        self.network.extend(self._heads.embed(input_ids), features, positions, attend, keep)

    @torch.inference_mode()
    def propose_behind(
        self, written: Written, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `AttendingDrafter`; the whole tree is looked at."""
        some, parts = _group(written), []
        for first in range(0, len(root_ids), some):
            those = slice(first, first + some)
            parts.append(self._propose(written._replace(paths=written.paths[those]), root_ids[those], tree))
        token_ids, log_probs = zip(*parts, strict=True)
        return torch.cat(token_ids), torch.cat(log_probs)

    def _propose(self, written: Written, root_ids: Tensor, tree: DraftTree) -> tuple[Tensor, Tensor]:
        threads, device, heads = len(root_ids), root_ids.device, self._heads
        token_ids = root_ids.new_zeros(threads, len(tree))
        log_probs = torch.zeros(threads, len(tree), dtype=torch.float32, device=device)
        paths = _Paths(written, heads.num_layers, 1 + sum(len(level.inner) for level in tree.levels), device)
        ids, features = root_ids[:, None], written.pool.features_at(paths.last)[:, None]  # [T, rows of the level]
        above = torch.zeros(1, 0, dtype=torch.bool, device=device)  # [rows, earlier drafted rows], which each sees
        for depth, (level, places) in enumerate(zip(tree.levels, tree_tensors(tree, device).levels, strict=True)):
            rows = ids.shape[1]
            seen = torch.cat([above, torch.eye(rows, dtype=torch.bool, device=device)], dim=1)
            positions = (paths.lengths[:, None] + depth).expand(threads, rows)
            embedded = heads.embed(ids).flatten(0, 1)
            drafted = self.network(embedded, features.flatten(0, 1), positions.flatten(), paths.attend(seen))
            best, chances = heads.top(self._unembed(drafted.states), level.top_k)
            best, chances = best.unflatten(0, (threads, rows)), chances.unflatten(0, (threads, rows))
            found = best[:, places.parents, places.ranks]
            token_ids[:, places.nodes], log_probs[:, places.nodes] = found, chances[:, places.parents, places.ranks]
            features = drafted.features.unflatten(0, (threads, rows))[:, places.inner_parents]
            ids, above = found[:, places.inner], seen[places.inner_parents]
        return token_ids, log_probs

    def _packed_unembed(self, x: Tensor) -> Tensor:
        return base_logit_scale(self._panels(x), self._heads.base)


def _group(written: Written) -> int:
    """How many threads draft at once: their paths' keys and values are gathered side by side, each as long as the
    longest."""
    first = written.pool.storage.first_draft_layer
    assert first is not None
    keys = written.pool.keys[first]
    each = 2 * max(map(len, written.paths)) * keys[0].numel() * keys.element_size()
    return max(MOST_BYTES // max(each, 1), 1)


class _Paths:
    """Keys and values of T threads' paths and, behind them, of so many drafted rows."""

    def __init__(self, written: Written, layers: int, drafted: int, device: torch.device) -> None:
        lengths = [len(path) for path in written.paths]
        self._longest = max(lengths)
        slots = torch.full((len(lengths), self._longest), -1, dtype=torch.long)
        for row, path in zip(slots, written.paths, strict=True):
            row[: len(path)] = torch.from_numpy(path)
        self.last = slots[torch.arange(len(lengths)), torch.tensor(lengths) - 1].to(device)
        self.lengths = torch.tensor(lengths, device=device)
        slots[:, 0] = -1  # nobody attends to a path's first token
        self._visible = (slots >= 0).to(device)[:, None, None]  # [T, 1, 1, longest]
        slots, pool, first = slots.clamp_(min=0).to(device), written.pool, written.pool.storage.first_draft_layer
        assert first is not None
        self._kept = []  # of each layer keys and values, [T, longest + drafted, heads, D]
        for layer in range(first, first + layers):
            stores = pool.keys[layer], pool.values[layer]
            both = [store.new_empty(len(slots), self._longest + drafted, *store.shape[1:]) for store in stores]
            for kept, store in zip(both, stores, strict=True):
                kept[:, : self._longest] = store[slots]
            self._kept.append(both)

    def attend(self, seen: Tensor) -> Attend:
        """seen: bool [rows, drafted rows so far], which of these each row of a level sees; its own come last."""
        threads, (rows, drafted) = len(self.lengths), seen.shape
        end = self._longest + drafted
        visible = torch.cat(
            [self._visible.expand(threads, 1, rows, -1), seen.expand(threads, 1, rows, drafted)], dim=-1
        )

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (threads, rows)) for x in (q, k, v))  # [T, rows, heads, D]
            keys, values = self._kept[index]
            keys[:, end - rows : end], values[:, end - rows : end] = k, v
            own, keys, values = (x.transpose(1, 2) for x in (q.to(keys.dtype), keys[:, :end], values[:, :end]))
            out = F.scaled_dot_product_attention(own, keys, values, attn_mask=visible, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1).to(q.dtype)

        return attention


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
