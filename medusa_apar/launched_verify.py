"""Verification by the kernel that goes from logits to accepted paths: one launch for a forest, and one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .control_tokens import ControlTokens
from .forest import Forest
from .triton_kernels.reference import Noise, Verified
from .verdict import Verdict


def launch(
    verify: Callable[..., Verified],
    forest: Forest,
    logits: torch.Tensor,
    control: ControlTokens | None,
    fork_bans: Sequence[bool],
    seed: int | None,
) -> list[Verdict]:
    """A verdict per verified stem, from `triton_kernels.verify.verify` or its reference.

    logits [M, vocab] of the forest's verified rows, which is what `fork_bans` goes by; seed: None is greedy.
    """
    stems = forest.verified
    first_rows = np.cumsum([0, *(1 + len(stem.draft_tokens) for stem in stems)])
    tokens, parents, depths = [], [], []
    for stem, first in zip(stems, first_rows.tolist(), strict=False):
        drafted, tree = len(stem.draft_tokens), stem.draft_tree
        tokens += [stem.pending[-1], *stem.draft_tokens]
        parents.append(np.concatenate([[-1], first + 1 + tree.parents[:drafted]]))
        depths.append(np.concatenate([[0], 1 + tree.depths[:drafted]]))
    ids, above, firsts, bans = _sent([tokens, np.concatenate(parents), first_rows, fork_bans], np.int32, logits.device)
    noise = None
    if seed is not None:
        keys = np.array([stem.thread.key for stem in stems], dtype=np.uint64).view(np.int64)
        seeds = np.full(len(stems), seed, dtype=np.int64)
        positions = np.concatenate([stem.thread.end + depth for stem, depth in zip(stems, depths, strict=True)])
        noise = Noise(*_sent([seeds, keys, positions], np.int64, logits.device))
    depth = max(int(depth.max()) for depth in depths)
    verified = verify(
        *(logits, ids, above, firsts, depth),
        bans=bans,
        control=control and (control.fork_id, control.child_id),
        noise=noise,
    )
    read = Verified(verified.packed.cpu())
    columns = (part.tolist() for part in (read.lengths, read.last_rows, read.tokens, read.rows))
    return [
        Verdict(tokens[:length], [row - first - 1 for row in rows[: length - 1]], last)
        for first, length, last, tokens, rows in zip(first_rows.tolist(), *columns, strict=False)
    ]


def _sent(parts: Sequence, dtype: type, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Each part on the device, all in one copy."""
    arrays: list[np.ndarray] = [np.asarray(part, dtype=dtype) for part in parts]
    flat = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return flat.to(device, non_blocking=True).split([len(array) for array in arrays])
