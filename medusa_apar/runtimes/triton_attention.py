"""The `triton` attention backend: the forest's queries over slots, no mask of queries times slots anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch

from medusa_apar.triton_kernels.layout import LayoutKind, TreeLayout
from medusa_apar.triton_kernels.tree_attention import INTERPRETED, tile_for, tree_attention

# Programs that fill an H100 twice over. A forest with as many query tiles walks its paths: partial results would weigh
# more than what parallel chunks gain.
_PROGRAMS = 2 * 132


class Laid(Protocol):
    """A forest, or what stands for one in a captured graph."""

    def layout(self, kind: LayoutKind) -> TreeLayout: ...


@dataclass(frozen=True, slots=True, eq=False)
class TreeMask:
    """What `triton_forest_attention` receives as `attention_mask`: all a kind of layers needs to know."""

    forest: Laid
    window: int | None


def tree_mask(forest: Laid, mask_function: Callable, local_size: int | None) -> TreeMask:
    """A layer's pattern as a window of path positions; NotImplementedError for one that is no window."""
    window = local_size or None
    edge = 5 if window is None else window  # the first position that a window of this size shuts something out of
    places = partial(torch.arange, dtype=torch.long, device="cpu")
    query = places(edge, edge + 1)[None, None, None]
    seen = mask_function(places(1)[None, None, None], 0, query, places(edge + 2)[None, None, None])
    expected = torch.tensor([*([True] if window is None else [False]), *[True] * edge, False], device="cpu")
    if not torch.equal(seen.expand(1, 1, 1, edge + 2).flatten(), expected):
        raise NotImplementedError("it attends in a pattern that is no window")
    return TreeMask(forest, window)


def triton_forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: TreeMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, N, head_dim], key and value what KVPool returns."""
    layout = _layout(attention_mask, query, key.shape[1])
    out = tree_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layout,
        scale=scaling,
        window=attention_mask.window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _layout(mask: TreeMask, query: torch.Tensor, kv_heads: int) -> TreeLayout:
    heads, rows, dim = query.shape[1:]
    group = heads // kv_heads
    tile = tile_for(query.dtype, dim, group, rows)
    blocks = -(-rows // (tile.rows // group))
    return mask.forest.layout(LayoutKind(mask.window, tile, group, walk=blocks * kv_heads >= _PROGRAMS))


@cache
def unsupported_reason(device: str) -> str | None:
    """Why the kernels cannot run on a kind of device, in half a sentence; None where they can."""
    if device == "cuda" or INTERPRETED:
        return None
    return f"Triton's kernels do not run on {device} (its interpreter does, with TRITON_INTERPRET=1)"
