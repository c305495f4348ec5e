"""What all draft heads share: the base they read and whose unembedding they use, drafting, residual blocks.

Head h (0-based) reads the hidden state from which the base predicts token t+1, and predicts token t+2+h.
The weights of all heads lie in one tensor per residual block, so K heads cost one matrix product instead of K;
`checkpoints.py` splits and stacks them for the files.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.models.families import base_logit_scale, unembedding_size
from medusa_apar.reading import reading
from medusa_apar.runtimes.capture import aux_layer_modules
from medusa_apar.runtimes.cpu.weight_fingerprint import plain
from medusa_apar.said import say_once

from . import checkpoints
from .drafters import KernelDrafter, PackedDrafter, TorchDrafter
from .weight_copies import DraftRows, WeightCopies

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="DraftHeads")

# Tokens that a model may have gained since its heads were trained (or an eighth of all): new ones are never drafted.
MAX_ADDED = 1024


def zeros(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """On the CPU, and float32 where no dtype is given: never by defaults, which another Python thread may change."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype or torch.float32, device="cpu"))


class ResidualBlock(nn.Module):
    """One residual block of every head at once: x + SiLU(W x + b). Zero weights make it the identity."""

    def __init__(self, num_heads: int, hidden_size: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = zeros(num_heads, hidden_size, hidden_size, dtype=dtype)
        self.bias = zeros(num_heads, hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H], read by all heads, or [heads, T, H] -> [heads, T, H]."""
        heads, hidden = self.bias.shape
        if x.dim() == 2:  # one product over all heads
            y = F.linear(x, self.weight.view(-1, hidden), self.bias.view(-1))
            y = y.view(-1, heads, hidden).transpose(0, 1)
        else:
            y = torch.baddbmm(self.bias[:, None], x, self.weight.mT)
        return x + F.silu(y)

    def of(self, head: int, x: Tensor) -> Tensor:
        """One head's block alone: [..., H] -> [..., H]."""
        return x + F.silu(F.linear(x, self.weight[head], self.bias[head]))


class LevelTensors(NamedTuple):
    """A `draft_tree.Level`; `inner_parents` are the parents of its inner nodes."""

    nodes: Tensor
    parents: Tensor
    ranks: Tensor
    inner: Tensor
    inner_parents: Tensor


class TreeTensors(NamedTuple):
    """A draft tree's arrays as long tensors on a device: indexing with arrays would wait for what it is doing."""

    depths: Tensor
    ranks: Tensor
    levels: list[LevelTensors]


_trees: weakref.WeakKeyDictionary[DraftTree, dict[torch.device, TreeTensors]] = weakref.WeakKeyDictionary()


def tree_tensors(tree: DraftTree, device: torch.device) -> TreeTensors:
    """Made once for each tree and device."""
    made = _trees.setdefault(tree, {})
    if device not in made:

        def tensors(*arrays: np.ndarray) -> Iterator[Tensor]:
            return (torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device) for array in arrays)

        levels = [
            LevelTensors(*tensors(level.nodes, level.parents, level.ranks, level.inner, level.parents[level.inner]))
            for level in tree.levels
        ]
        depths, ranks = tensors(tree.depths, tree.ranks)
        made[device] = TreeTensors(depths, ranks, levels)
    return made[device]


class DraftHeads(nn.Module):
    """Heads that read a base model's hidden states and propose tokens through its unembedding.

    `token_map` [draft vocabulary] restricts what the heads can propose to these vocabulary ids. `aux_layers` are the
    base layers (0-based) whose outputs are read beside the final hidden state, as EAGLE-3 fuses them (arXiv
    2503.01840). Wherever `hidden_states` is taken, its last dimension is `input_size`: the final state first, then a
    state per aux layer.
    """

    kind: str  # "medusa" or "hydra", as config.json says it
    token_map: Tensor | None
    # Share of positions where a head's guess of each rank is the base's choice, [heads][ranks]; None: not measured.
    acceptance: list[list[float]] | None = None

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        token_map: Tensor | None = None,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.num_heads, self.num_layers = num_heads, num_layers
        self.hidden_size, self.vocab_size, self.aux_layers = hidden_size, vocab_size, tuple(aux_layers)
        if token_map is not None:
            token_map = _checked_token_map(token_map, vocab_size)
        self.register_buffer("token_map", token_map)
        self.draft_vocab_size = vocab_size if token_map is None else len(token_map)
        # The base is referenced in a tuple, which torch does not search for submodules: not saved, moved or counted.
        self._base: tuple[PreTrainedModel, ...] = ()
        self._copies = WeightCopies()

    @property
    def input_size(self) -> int:
        return self.hidden_size * (1 + len(self.aux_layers))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    # ---- what a kind of heads is

    def states(self, hidden_states: Tensor, drafted: Tensor | None = None) -> Tensor:
        """What the unembedding is applied to: [T, input_size] -> [heads, T, H].

        drafted: long [T, heads], token t+1+j in column j; head h reads columns 0 to h. Heads that are independent of
            what was drafted ignore it.
        """
        raise NotImplementedError

    def draft(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, drafter: TorchDrafter
    ) -> tuple[Tensor, Tensor]:
        """`Drafter.propose`, in inference mode; states become tokens as `drafter` says."""
        raise NotImplementedError

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter:
        """As `drafting.drafter.Heads.drafter`. Calls that need other drafters of the same heads may run at once."""
        rows = self.draft_rows(bits=True) if self.token_map is not None and not self.owns_unembedding else None
        if kernels:
            return self._kernel_drafter(rows)
        return TorchDrafter(self, rows) if packing is None else PackedDrafter(self, rows, packing)

    def _kernel_drafter(self, rows: DraftRows | None) -> KernelDrafter:
        return KernelDrafter(self, rows)

    @property
    def owns_unembedding(self) -> bool:
        """Whether the base's unembedding is not used."""
        return False

    @property
    def shape_key(self) -> Hashable:
        shapes = tuple(tuple(parameter.shape) for parameter in self.parameters())
        return type(self).__name__, self.num_heads, self.draft_vocab_size, str(self.dtype), shapes

    def propose_only(self, token_map: Tensor | None) -> None:
        """Makes these vocabulary ids, long [n], the draft vocabulary; None: all ids. ValueError for heads whose own
        unembedding has rows for the ids that it was made with."""
        if self.owns_unembedding:
            raise ValueError(f"these {self.kind} heads own their unembedding: their draft vocabulary stays as it is")
        if token_map is not None:
            token_map = _checked_token_map(token_map, self.vocab_size).to(next(self.parameters()).device)
        self.token_map = token_map
        self.draft_vocab_size = self.vocab_size if token_map is None else len(token_map)
        self.refresh()

    def refresh(self) -> None:
        """Drops whatever was copied from weights: it is copied anew when it is needed."""
        self._copies.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without the base, which is saved by itself, and without copies of weights: heads that are unpickled are
        attached anew."""
        return self.__dict__ | {"_base": (), "_copies": WeightCopies()}

    def __copy__(self: Self) -> Self:
        return self._made_of(self.__getstate__(), self._base)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """On the same base, or on its copy where that is copied along."""
        other = memo[id(self)] = self._made_of({}, tuple(memo.get(id(base), base) for base in self._base))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo) | {"_base": other._base})
        return other

    def _made_of(self: Self, state: dict[str, Any], base: tuple[PreTrainedModel, ...]) -> Self:
        other = cast(Self, object.__new__(type(self)))
        other.__setstate__(state | {"_base": base})
        return other

    @classmethod
    def from_state(
        cls: type[Self],
        state: dict[str, Tensor],
        config: dict,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Heads on `model` from what `checkpoints.read` returns; dtype: None is the model's."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls: type[Self], path: str | os.PathLike[str], model: PreTrainedModel) -> Self:
        """Heads from a directory, file or Hub repository, as the model's dtype."""
        state, config = checkpoints.read(path)
        with reading(path, "cannot be used"):
            return cls.from_state(state, config, model)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """`medusa_lm_head.safetensors` and `config.json`."""
        raise NotImplementedError

    # ---- the base model

    def check_matches(self, model: PreTrainedModel) -> None:
        """ValueError if these heads cannot sit on `model`."""
        vocab_size, hidden_size = unembedding_size(model)
        if self.hidden_size != hidden_size:
            raise ValueError(
                f"these are heads of another model: their hidden size is {self.hidden_size}, the model's {hidden_size}."
            )
        if not 0 <= vocab_size - self.vocab_size <= max(self.vocab_size // 8, MAX_ADDED):
            raise ValueError(
                f"these are heads of another model: their vocabulary is {self.vocab_size}, the model's {vocab_size}."
            )
        if vocab_size > self.vocab_size:
            added, name = vocab_size - self.vocab_size, type(model).__name__
            say_once(
                logger, f"these heads never draft {added} of the {vocab_size} tokens of {name}, which are new to them."
            )
        if self.aux_layers:
            aux_layer_modules(model, self.aux_layers)

    def attach(self: Self, model: PreTrainedModel) -> Self:
        """Use `model`'s unembedding from now on."""
        self.check_matches(model)
        self._base = (model,)
        self.refresh()
        return self

    @property
    def base_name(self) -> str:
        """What the base calls itself, "" before the heads are attached to one."""
        return (self._base[0].name_or_path or "") if self._base else ""

    @property
    def base(self) -> PreTrainedModel:
        if not self._base:
            raise RuntimeError("these heads use the base's unembedding: call attach(model) first.")
        return self._base[0]

    def unembed(self, x: Tensor) -> Tensor:
        """The base's logits over the draft vocabulary: [..., H] -> [..., draft vocabulary]."""
        model = self.base
        if self.token_map is None:
            lm_head = model.get_output_embeddings()
            weight = getattr(lm_head, "weight", None)
            logits = lm_head(x.to(weight.dtype) if isinstance(weight, Tensor) else x)[..., : self.vocab_size]
        else:
            rows = self.draft_rows()
            logits = F.linear(x.to(rows.weight.dtype), rows.weight, rows.bias)
        return base_logit_scale(logits, model)

    def plain_unembedding(self, bits: bool = False) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias over the draft vocabulary; None where logits are more than their product. bits: as
        `draft_rows` has it."""
        config = self.base.config.get_text_config()
        if any(getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")):
            return None
        if self.token_map is not None:
            rows = self.draft_rows(bits)
            return rows.weight, rows.bias
        lm_head = self.base.get_output_embeddings()
        if type(lm_head) is not nn.Linear or not plain(lm_head.weight):
            return None
        return lm_head.weight[: self.vocab_size], None if lm_head.bias is None else lm_head.bias[: self.vocab_size]

    def draft_rows(self, bits: bool = False) -> DraftRows:
        """The base's unembedding at `token_map`, copied once and again where the base's has changed; bits: as
        `WeightCopies.get` has it."""
        assert self.token_map is not None
        lm_head = self.base.get_output_embeddings()
        weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
        if weight is None or not plain(weight) or not weight.is_floating_point():
            kept: DraftRows | None = self._copies.last("rows")
            if kept is None:  # quantised before the first draft
                raise ValueError(f"cannot take rows of a quantised unembedding ({type(lm_head).__name__}).")
            return kept
        weights = [self.token_map, weight, *([bias] if isinstance(bias, Tensor) else [])]
        return self._copies.get("rows", weights, partial(_rows, *weights), bits)

    # ---- drafting

    def head_logits(self, states: Tensor) -> Tensor:
        """[heads, T, H] of `states` -> [heads, T, draft vocabulary]."""
        return self.unembed(states)

    def logits(self, hidden_states: Tensor, drafted: Tensor | None = None) -> Tensor:
        """[T, input_size], long [T, heads] -> [heads, T, draft vocabulary]."""
        return self.head_logits(self.states(hidden_states, drafted))

    @torch.inference_mode()
    def guess(self, hidden_states: Tensor, drafted: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """Each head's `top_k` likeliest tokens, best first, where the tokens before it are `drafted`.

        hidden_states [T, input_size], drafted long [T, heads] as in `states` -> token ids (long) and
        log-probabilities (float32, over the draft vocabulary), both [T, heads, top_k].
        """
        token_ids, log_probs = self.top(self.logits(hidden_states, drafted), top_k)
        return token_ids.transpose(0, 1), log_probs.transpose(0, 1)

    def top(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """[..., draft vocabulary] -> vocabulary ids (long) and log-probabilities (float32), both [..., top_k]."""
        logits = logits.float()
        best, index = logits.topk(top_k, dim=-1)
        return self.vocabulary_ids(index), best - logits.logsumexp(-1, keepdim=True)

    def vocabulary_ids(self, index: Tensor) -> Tensor:
        """Places in the draft vocabulary -> ids of the vocabulary."""
        return index if self.token_map is None else self.token_map[index]

    def _config(self) -> dict[str, Any]:
        """What every kind's config.json says."""
        return {
            "medusa_num_heads": self.num_heads,
            "medusa_num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "acceptance": self.acceptance and [[round(share, 4) for share in ranks] for ranks in self.acceptance],
            "base_model_name_or_path": self.base_name,
        }


def _rows(token_map: Tensor, weight: Tensor, bias: Tensor | None = None) -> DraftRows:
    # Outside of inference mode even if the caller is in it: training uses these rows too.
    with torch.inference_mode(False), torch.no_grad():
        rows = token_map.to(weight.device)
        return DraftRows(weight[rows], None if bias is None else bias[rows])


def _checked_token_map(token_map: Tensor, vocab_size: int) -> Tensor:
    token_map = torch.as_tensor(token_map, dtype=torch.long).clone()
    if token_map.dim() != 1 or not 0 < len(token_map) <= vocab_size:
        raise ValueError(f"token_map has shape {list(token_map.shape)}, must be 1 to {vocab_size} vocabulary ids.")
    for token in (int(token_map.min()), int(token_map.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token_map holds id {token}, outside the vocabulary of {vocab_size}.")
    if len(token_map.unique()) < len(token_map):
        raise ValueError(f"token_map repeats {len(token_map) - len(token_map.unique())} of its {len(token_map)} ids.")
    return token_map
