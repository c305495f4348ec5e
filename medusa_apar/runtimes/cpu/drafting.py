"""Drafting with Hydra heads in one call of compiled code: see `hydra.h`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medusa_apar.drafting.draft_tree import DraftTree

from . import library
from .library import address, floats
from .weights import KINDS, PANEL, PackedMatrix

_EPS = float(torch.finfo(torch.float32).eps)  # F.rms_norm's own


class CompiledHydra:
    """Heads as `heads/hydra.py` has them, packed as `kind`."""

    def __init__(self, heads: Any, unembedding: tuple[Tensor, Tensor | None], kind: str) -> None:
        self._table = heads.base.get_input_embeddings().weight.detach()
        tokens, hidden = self._table.shape
        self._token_map = None if heads.token_map is None else heads.token_map.to("cpu", torch.long).contiguous()
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
            *(heads.num_heads, len(heads.blocks), hidden, self._inputs, heads.draft_vocab_size, tokens),
            *(KINDS[str(self._table.dtype).removeprefix("torch.")], _EPS),
            address(self._table, self._table.dtype, tokens * hidden),
            None if self._token_map is None else address(self._token_map, torch.long, heads.draft_vocab_size),
            *(self._states.struct, self._unembedding.struct, *self._arrays),
        )
        self._trees: weakref.WeakKeyDictionary[DraftTree, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()

    @property
    def key(self) -> Hashable:
        return id(self)  # what it reads was packed when it was made

    def propose(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `Drafter.propose`; below nodes that are less likely the token is -1, its log-probability -inf."""
        states, root_ids, count = hidden_states.float().contiguous(), root_ids.contiguous(), len(root_ids)
        least = math.log(min_probability) if min_probability > 0 else -math.inf
        assert states.shape == (count, self._inputs) and len(tree.levels) <= self._struct.heads
        made = self._trees.get(tree)
        if made is None:
            made = self._trees[tree] = packed_tree(tree)
        nodes = len(tree)
        token_ids, log_probs = torch.empty(count, nodes, dtype=torch.long, device="cpu"), floats(count, nodes)
        if library.library().mapar_hydra(
            *(self._struct, made[0], address(states, torch.float32, count * self._inputs)),
            *(address(root_ids, torch.long, count), count, least),
            *(address(token_ids, torch.long, count * nodes), address(log_probs, torch.float32, count * nodes)),
            torch.get_num_threads(),
        ):
            raise IndexError(f"a token is not one of the model's {len(self._table)}")
        return token_ids, log_probs


def compilable(heads: Any, unembedding: tuple[Tensor, Tensor | None]) -> bool:
    """Whether heads of these sizes, on such a base, can be compiled: compiled code looks every drafted token up."""
    table = heads.base.get_input_embeddings()
    dtypes = (torch.float32, torch.bfloat16)
    if type(table) is not nn.Embedding or table.weight.dtype not in dtypes or not table.weight.is_contiguous():
        return False
    tokens, hidden = table.weight.shape
    drafted = heads.draft_vocab_size if heads.token_map is None else 1 + int(heads.token_map.max())
    if drafted > tokens or len(unembedding[0]) != heads.draft_vocab_size:
        return False
    return hidden == heads.hidden_size and hidden % PANEL == 0


def packed_tree(tree: DraftTree) -> tuple[Any, list[Tensor]]:
    """As compiled code reads it, and what has to stay alive for that."""
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
    arrays = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.int32)) for part in parts]
    pointers = (address(array, torch.int32, len(array)) for array in arrays)
    return library.Tree(len(levels), len(tree), *pointers), arrays
