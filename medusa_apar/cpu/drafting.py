"""Drafting with Hydra heads in one call of compiled code: see `hydra.h`."""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medusa_apar.draft_tree import DraftTree

from . import library
from .weights import KINDS, PANEL, PackedMatrix

_EPS = float(torch.finfo(torch.float32).eps)  # F.rms_norm's own


class CompiledHydra:
    """Heads as `heads/hydra.py` has them, packed as `kind`."""

    def __init__(self, heads: Any, unembedding: tuple[Tensor, Tensor | None], kind: str) -> None:
        self._table = heads.base.get_input_embeddings().weight.detach()
        self._token_map = heads.token_map
        self._inputs = heads.input_size
        self._states = PackedMatrix(heads.from_states.flatten(0, 1), kind, heads.bias.flatten())
        self._unembedding = PackedMatrix(unembedding[0], kind, unembedding[1])
        self._token = [PackedMatrix(weight.flatten(0, 1), kind) for weight in heads.from_token]
        self._block = [
            PackedMatrix(block.weight[head], kind, block.bias[head])
            for block in heads.blocks
            for head in range(heads.num_heads)
        ]
        self._arrays = tuple(
            (library.Matrix * len(matrices))(*(matrix.struct for matrix in matrices)) if matrices else None
            for matrices in (self._token, self._block)
        )
        self._struct = library.Hydra(
            *(heads.num_heads, len(heads.blocks), heads.hidden_size, self._inputs, heads.draft_vocab_size),
            *(KINDS[str(self._table.dtype).removeprefix("torch.")], _EPS, self._table.data_ptr()),
            None if self._token_map is None else self._token_map.data_ptr(),
            *(self._states.struct, self._unembedding.struct, *self._arrays),
        )
        self._trees: weakref.WeakKeyDictionary[DraftTree, tuple[Any, list[np.ndarray]]] = weakref.WeakKeyDictionary()

    def propose(
        self, states: Tensor, root_ids: Tensor, tree: DraftTree, least: float = -math.inf
    ) -> tuple[Tensor, Tensor]:
        """As `DraftHeads.propose`; below nodes whose path has a log-probability under `least` nothing is looked for:
        the token is -1, its log-probability -inf."""
        states, root_ids = states.float().contiguous(), root_ids.contiguous()
        assert states.shape == (len(root_ids), self._inputs) and root_ids.dtype == torch.int64
        if tree not in self._trees:
            self._trees[tree] = _tree(tree)
        token_ids = torch.empty(len(root_ids), len(tree), dtype=torch.long)
        log_probs = torch.empty(len(root_ids), len(tree))
        library.library().mapar_hydra(
            *(self._struct, self._trees[tree][0], states.data_ptr(), root_ids.data_ptr(), len(root_ids)),
            *(least, token_ids.data_ptr(), log_probs.data_ptr(), torch.get_num_threads()),
        )
        return token_ids, log_probs


@dataclass(slots=True)
class Pruned:
    """A drafter that does not look below what is less likely than `chance`, which may change from step to step."""

    drafter: CompiledHydra
    chance: float

    def propose(self, states: Tensor, root_ids: Tensor, tree: DraftTree) -> tuple[Tensor, Tensor]:
        return self.drafter.propose(states, root_ids, tree, math.log(self.chance))


def compilable(heads: Any) -> bool:
    """Whether heads of these sizes, on such a base, can be compiled."""
    table = heads.base.get_input_embeddings()
    dtypes = (torch.float32, torch.bfloat16)
    return type(table) is nn.Embedding and table.weight.dtype in dtypes and heads.hidden_size % PANEL == 0


def _tree(tree: DraftTree) -> tuple[Any, list[np.ndarray]]:
    levels = tree.levels
    parts = [
        [len(level.nodes) for level in levels],
        [len(level.inner) for level in levels],
        [level.top_k for level in levels],
        *(
            np.concatenate([getattr(level, name) for level in levels])
            for name in ("nodes", "parents", "ranks", "inner")
        ),
    ]
    arrays = [np.asarray(part, dtype=np.int32) for part in parts]
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in arrays)
    return library.Tree(len(levels), len(tree), *pointers), arrays
