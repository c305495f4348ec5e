"""What `pack` reads and writes of a step, and what it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import MAX_NODES


class Descriptor(NamedTuple):
    """What `pack` reads of a step: views of one buffer, R commits, S leaves and W rows, all of them possibly padded."""

    rows: torch.Tensor  # int32 [4, W]: token, path position, slot, and the verified rows
    words: torch.Tensor  # int64 [W], of each row the draft nodes that it sees, bit by bit
    queries: torch.Tensor  # int32 [S + 1], where each leaf's begin
    leaves: torch.Tensor  # int32 [S, 3]: first row, queries on the path, length of the path
    commits: torch.Tensor  # int32 [2, R]: an entry of the table, -1 for none, and the slot that it becomes
    windows: torch.Tensor  # int32 [MAX_WINDOWS], path positions that a kind of layers sees; 0: no such kind


class Packed(NamedTuple):
    """What `pack` writes."""

    rows: torch.Tensor  # int64 [4, W]
    queries: torch.Tensor  # int32 [4, W]: order, positions, lengths and leaves of TreeLayout
    ancestors: torch.Tensor  # int64 [MAX_WINDOWS, W]


def pack(descriptor: Descriptor, table: torch.Tensor, packed: Packed) -> None:
    """Commits slots to the table of chunks, int32 [chunks, columns], and spreads leaves over their queries.

    The rows of a leaf are side by side: those on its path, then its draft nodes. A window narrows `words` to nodes that
    a row has in its window. Idempotent.
    """
    rows, words, queries, leaves, commits, windows = descriptor
    column, slot = commits[:, commits[0] >= 0]
    table.view(-1)[column.long()] = slot
    packed.rows.copy_(rows)
    counts = queries.diff()
    leaf = torch.repeat_interleave(torch.arange(len(leaves), dtype=torch.int64, device=rows.device), counts)
    first, pending, length = leaves[leaf].T
    order = first + torch.arange(len(leaf), dtype=torch.int64, device=rows.device) - queries[leaf]
    positions = rows[1, order]
    packed.queries[:] = torch.stack([order.int(), positions, length, leaf.int()])
    nodes = torch.arange(MAX_NODES, dtype=torch.int64, device=rows.device)
    drafted = nodes < (counts[leaf] - pending)[:, None]
    node_positions = rows[1, ((first + pending)[:, None] + nodes).clamp(max=rows.shape[1] - 1)]
    above = drafted & (words[order, None] >> nodes & 1).bool()
    for index, window in enumerate(windows.tolist()):
        if window:
            near = above & (node_positions > (positions - window)[:, None])
            packed.ancestors[index] = torch.where(near, 1 << nodes, 0).sum(1)
