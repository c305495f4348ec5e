"""What a step chooses, without leaving the device: verification in one launch, drafting behind it, one read of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.forest.forest import Forest
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.triton_kernels.reference import Noise, TypicalAcceptance, Verified

from .verdict import Verdict


class Drafting(NamedTuple):
    """Who proposes, and a tree of how many nodes below every thread."""

    drafter: Drafter
    tree: DraftTree

    @property
    def operations(self) -> tuple:
        """What runs, as a key for captured steps."""
        return self.drafter.key, self.tree


@dataclass(slots=True, eq=False)
class Choice:
    """One step's verification and drafting, ready to run behind its forward pass.

    verify: `triton_kernels.verify.verify`, or its reference. depth: most draft nodes that a thread can accept.
    process: what the logits go through before; with it a step is not the same operations each time.
    T counts threads: a stem's, and behind it each `[Child]` below a drafted `[Fork]`.
    """

    verify: Callable[..., Verified]
    control: ControlTokens | None
    depth: int
    drafting: Drafting | None
    process: Callable[[Tensor], Tensor] | None
    first_rows: np.ndarray  # int64 [T + 1]
    rows: tuple[np.ndarray, ...]  # [M]: tokens, parents among the M, fork bans
    noise: tuple[np.ndarray, ...] | None  # int64: seeds [T], keys [T], positions [M]
    forks: list[list[int]]  # of each stem: nodes of `[Fork]`s whose `[Child]`s are threads of their own here
    typical: TypicalAcceptance | None = None

    @classmethod
    def of(
        cls,
        verify: Callable[..., Verified],
        forest: Forest,
        control: ControlTokens | None,
        fork_bans: Sequence[bool],
        seed: int | None,
        depth: int,
        drafting: Drafting | None,
        process: Callable[[Tensor], Tensor] | None = None,
        typical: TypicalAcceptance | None = None,
    ) -> Choice:
        """For a forest's verified stems; `fork_bans` goes by their rows, and seed None is greedy."""
        sizes: list[int] = []
        keys: list[int] = []
        tokens, parents, positions = [], [], []
        first = 0
        for stem in forest.verified:
            drafted, tree = len(stem.draft_tokens), stem.draft_tree
            own = first + 1 + tree.parents[:drafted]
            own[stem.guessed :] = -1  # a `[Child]` is the root of its own thread
            tokens += [stem.pending[-1], *stem.draft_tokens]
            parents.append(np.concatenate([[-1], own]))
            positions.append(stem.thread.end + np.concatenate([[0], 1 + tree.depths[:drafted]]))
            sizes += [1 + stem.guessed, *([1] * len(stem.forks))]
            first += 1 + drafted
            if seed is not None:
                keys += [stem.thread.key, *(stem.child_key(fork) for fork in stem.forks)]
        first_rows = np.cumsum([0, *sizes])
        noise = None
        if seed is not None:
            named = np.array(keys, dtype=np.uint64).view(np.int64)
            seeds = np.full(len(keys), seed & (2**64 - 1), dtype=np.uint64).view(np.int64)
            noise = seeds, named, np.concatenate(positions)
        rows = np.array(tokens, dtype=np.int64), np.concatenate(parents), np.array(fork_bans, dtype=np.int64)
        forks = [list(stem.forks) for stem in forest.verified]
        return cls(verify, control, depth, drafting, process, first_rows, rows, noise, forks, typical)

    @property
    def operations(self) -> tuple | None:
        """What runs, as a key for captured steps; None where it cannot be captured."""
        if self.process is not None:
            return None
        drafting = self.drafting and self.drafting.operations
        return self.control, self.depth, drafting, self.noise is not None, self.typical

    @property
    def threads(self) -> int:
        return len(self.first_rows) - 1

    def inputs(self, queries: int | None = None, threads: int | None = None) -> Tensor:
        """All that `run` reads, on the CPU, int64: for exactly these stems, or padded to more rows and threads."""
        queries = len(self.rows[0]) if queries is None else queries
        threads = self.threads if threads is None else threads
        parts = [*self.rows, self.first_rows, *(self.noise or ())]
        sizes = self._sizes(queries, threads)
        return torch.from_numpy(np.concatenate([_grown(*pair) for pair in zip(parts, sizes, strict=True)]))

    def _sizes(self, queries: int, threads: int) -> list[int]:
        """Even ones: Triton compiles a kernel anew for addresses that are no multiples of 16 bytes."""
        sizes = [queries, queries, queries, threads + 1]
        if self.noise is not None:
            sizes += [threads, threads, queries]
        return [size + size % 2 for size in sizes]

    def run(self, logits: Tensor, hidden: Tensor, inputs: Tensor, threads: int | None = None) -> Tensor:
        """logits [M, vocab], hidden [M, input_size] and `inputs` on their device -> int32 for `read`, [T, *]."""
        queries = len(logits)
        threads = self.threads if threads is None else threads
        tokens, parents, bans, first_rows, *noise = inputs.split(self._sizes(queries, threads))
        if self.process is not None:
            logits = self.process(logits)
        verified = self.verify(
            *(
                logits,
                *(part[:queries].int() for part in (tokens, parents)),
                first_rows[: threads + 1].int(),
                self.depth,
            ),
            bans=bans[:queries].int(),
            control=self.control and (self.control.fork_id, self.control.child_id),
            noise=Noise(noise[0][:threads], noise[1][:threads], noise[2][:queries]) if noise else None,
            typical=self.typical,
        )
        if self.drafting is None:
            return verified.packed
        # Threads that only fill a size up have chosen nothing: theirs may be any row and token.
        last = (verified.lengths.long() - 1).clamp(min=0)
        roots = verified.tokens.gather(1, last[:, None])[:, 0].long().clamp(min=0)
        states = hidden[verified.last_rows.long().clamp(min=0)]
        guesses, log_probs = self.drafting.drafter.propose(states, roots, self.drafting.tree)
        drafted = guesses.to(torch.int32), log_probs.float().contiguous().view(torch.int32)
        return torch.cat([verified.packed, *drafted], dim=1)

    def read(self, chosen: Tensor) -> list[Verdict]:
        """A verdict per verified stem, with what was drafted behind each: the one wait for the device."""
        read = chosen[: self.threads].cpu()
        nodes = 0 if self.drafting is None else len(self.drafting.tree)
        width = read.shape[1] - 2 * nodes
        verified = Verified(read[:, :width])
        columns = (part.tolist() for part in (verified.lengths, verified.last_rows, verified.tokens, verified.rows))
        every = [
            Verdict(tokens[:length], [row - first - 1 for row in rows[: length - 1]], last)
            for first, length, last, tokens, rows in zip(self.first_rows.tolist(), *columns, strict=False)
        ]
        if nodes:
            guesses, log_probs = read[:, width : width + nodes].numpy(), read[:, width + nodes :].contiguous()
            for verdict, ids, chances in zip(every, guesses, log_probs.view(torch.float32).numpy(), strict=True):
                verdict.guessed = ids.astype(np.int64), chances
        verdicts, place = [], 0
        for forks in self.forks:
            verdicts.append(every[place])
            every[place].children = dict(zip(forks, every[place + 1 :], strict=False))
            place += 1 + len(forks)
        return verdicts


def _grown(array: np.ndarray, length: int) -> np.ndarray:
    """Filled up with its last entry: for `first_rows` that is a thread without rows, elsewhere nobody looks."""
    return np.concatenate([array, np.full(length - len(array), array[-1])])
