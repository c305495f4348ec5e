"""Forests of a given size for the kernels: threads that forked at the end of one prefix, each with its draft tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medusa_apar.triton_kernels.layout import CHUNK, Leaf, TreeLayout, plan
from medusa_apar.triton_kernels.tree_attention import tile_for

OWN_TOKENS = 64  # that each thread wrote behind the shared prefix


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer of a model."""

    name: str
    heads: int
    kv_heads: int
    dim: int


# Qwen3-4B's attention is Llama-3.1-8B's (32 heads of 128, 8 of keys and values): one row stands for both.
SHAPES = (Shape("Llama-3.1-8B, Qwen3-4B", 32, 8, 128), Shape("SmolLM2-135M", 9, 3, 64))


@dataclass(frozen=True, slots=True)
class Case:
    threads: int
    nodes: int  # rows of each thread: a root and draft nodes
    prefix: int

    @property
    def rows(self) -> int:
        return self.threads * self.nodes

    @property
    def columns(self) -> int:
        """Distinct tokens whose keys and values are read."""
        return self.prefix + self.threads * (OWN_TOKENS + self.nodes - 1)


def leaves(case: Case, seed: int = 0) -> list[Leaf]:
    """Slots in random order; a draft tree is a random one whose nodes hang below earlier ones."""
    generator = np.random.default_rng(seed)
    slots = generator.permutation(case.columns)
    prefix, rest = slots[: case.prefix], slots[case.prefix :].reshape(case.threads, -1)
    parents = [-1 if node == 0 else int(generator.integers(-1, node)) for node in range(case.nodes - 1)]
    depths: list[int] = []
    words: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        words.append((0 if parent < 0 else words[parent]) | 1 << node)
    length = case.prefix + OWN_TOKENS
    positions = np.array([length - 1, *(length + depth for depth in depths)])
    ancestors = np.array([0, *words], dtype=np.uint64)
    return [
        Leaf(
            np.concatenate([prefix, own]),
            length,
            np.arange(thread * case.nodes, (thread + 1) * case.nodes),
            positions,
            ancestors,
            shared=case.prefix if thread else 0,
        )
        for thread, own in enumerate(rest)
    ]


@dataclass(slots=True, eq=False)
class Problem:
    """One layer's attention over a case: tensors on the device."""

    shape: Shape
    case: Case
    query: torch.Tensor  # [rows, heads, dim]
    keys: torch.Tensor  # [columns, kv_heads, dim]
    values: torch.Tensor
    leaves: list[Leaf]

    @classmethod
    def make(cls, shape: Shape, case: Case, dtype: torch.dtype, device: str) -> Problem:
        torch.manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=device).to(dtype)

        pool = (case.columns, shape.kv_heads, shape.dim)
        query = normal(case.rows, shape.heads, shape.dim)
        return cls(shape, case, query, normal(*pool), normal(*pool), leaves(case))

    def doubles(self) -> list[torch.Tensor]:
        return [tensor.double() for tensor in (self.query, self.keys, self.values)]

    def layout(self, walk: bool) -> TreeLayout:
        group = self.shape.heads // self.shape.kv_heads
        tile = tile_for(self.query.dtype, self.shape.dim, group, self.case.rows)
        return plan(self.leaves, tile, group, CHUNK, walk).to(self.query.device)

    def mask(self) -> torch.Tensor:
        """bool [rows, columns], what the peers need."""
        visible = np.zeros((self.case.rows, self.case.columns), dtype=bool)
        for leaf in self.leaves:
            for row, position, word in zip(leaf.rows, leaf.positions, leaf.ancestors, strict=True):
                visible[row, leaf.slots[: min(position + 1, leaf.length)]] = True
                nodes = leaf.slots[leaf.length :]
                visible[row, nodes[[bool(int(word) >> node & 1) for node in range(len(nodes))]]] = True
        return torch.from_numpy(visible).to(self.query.device)

    @property
    def bytes(self) -> int:
        """Read and written at least once: keys, values, queries, results."""
        shared = 2 * self.keys.numel() + 2 * self.query.numel()
        return shared * self.query.element_size()

    @property
    def flops(self) -> int:
        seen = sum(leaf.length * len(leaf.rows) for leaf in self.leaves)
        return 4 * self.shape.heads * self.shape.dim * seen

    def describe(self) -> dict[str, Any]:
        return {
            "shape": self.shape.name,
            "threads": self.case.threads,
            "nodes": self.case.nodes,
            "prefix": self.case.prefix,
            "dtype": str(self.query.dtype).removeprefix("torch."),
        }
