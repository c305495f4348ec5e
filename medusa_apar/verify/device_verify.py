"""Verification of a step's threads in one launch, drafting behind it, and one read of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medusa_apar.drafting.drafter import AttendingDrafter
from medusa_apar.drafting.speculator import Drafting
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.triton_kernels.reference import Noise, Verified

from .path_changes import MaskChange, PathChange
from .verify_result import VerifyResult

Change = PathChange | MaskChange | None


class Modes(NamedTuple):
    """What a launch's threads need between them; it belongs to the key of captured steps."""

    control: tuple[int, int] | None  # ids of [Fork] and [Child]
    noise: bool
    typical: bool


@dataclass(slots=True, eq=False)
class DeviceVerify:
    """One step's verification and drafting, ready to run behind its forward pass.

    verify: `triton_kernels.verify.verify`, or its reference. depth: most draft nodes that a thread can accept.
    T counts threads: a segment's, and behind it each `[Child]` below a drafted `[Fork]`. M counts rows.
    """

    verify: Callable[..., Verified]
    depth: int
    drafting: Drafting | None
    modes: Modes
    segments: list[Segment]
    served: list[bool]  # which segments are verified here; the others are the host's
    first_rows: np.ndarray  # int64 [T + 1]
    rows: tuple[np.ndarray, ...]  # int64 [M]: tokens, parents among the M, fork bans
    threads: tuple[
        np.ndarray, ...
    ]  # int64 [T]: seeds, keys, whether sampled; then epsilon and delta as bits of float64
    positions: np.ndarray  # int64 [M]
    # Segments whose logits go through processors, each with its first row and what those do that look at its path.
    processed: list[tuple[int, Segment, list[Change]]]

    @classmethod
    def of(cls, verify: Callable[..., Verified], forest: Forest, depth: int, drafting: Drafting | None) -> DeviceVerify:
        """For all of a forest's verified segments; what the host verifies is verified here too, and ignored."""
        sizes: list[int] = []
        keys: list[int] = []
        seeds: list[int] = []
        sampled: list[int] = []
        limits: list[tuple[float, float]] = []
        tokens, parents, positions, bans = [], [], [], []
        processed: list[tuple[int, Segment, list[Change]]] = []
        served: list[bool] = []
        rules = [segment.request.options.rule for segment in forest.verified]
        control = next(((rule.fork_id, rule.child_id) for rule in rules if rule is not None), None)
        # One launch bans control tokens in all its rows: a request without the rule is the host's beside others.
        unruled = [control is not None and rule is None for rule in rules]
        first = 0
        for segment in forest.verified:
            sampler, drafted, tree = segment.request.sampler, len(segment.draft_tokens), segment.draft_tree
            own = first + 1 + tree.parents[:drafted]
            own[segment.num_candidates :] = -1  # a `[Child]` is the root of its own thread
            tokens += [segment.extend_tokens[-1], *segment.draft_tokens]
            parents.append(np.concatenate([[-1], own]))
            positions.append(segment.thread.end + np.concatenate([[0], 1 + tree.depths[:drafted]]))
            bans += sampler.fork_bans(segment)
            members = 1 + len(segment.forks)
            sizes += [1 + segment.num_candidates, *([1] * len(segment.forks))]
            keys += [segment.thread.key, *(segment.child_key(fork) for fork in segment.forks)]
            device = sampler.on_device and not unruled[len(served)]
            served.append(device)
            seeds += [(sampler.seed or 0) & (2**64 - 1)] * members
            sampled += [int(device and sampler.seed is not None)] * members
            typical = sampler.typical if device and sampler.seed is not None else None
            limits += [(-1.0, 0.0) if typical is None else (typical.epsilon, typical.delta)] * members
            if device and sampler.options.processors:
                processed.append((first, segment, sampler.path_changes(segment)))
            first += 1 + drafted
        first_rows = np.cumsum([0, *sizes])
        rows = np.array(tokens, dtype=np.int64), np.concatenate(parents), np.array(bans, dtype=np.int64)
        bits = np.array(limits).T.copy().view(np.int64)
        unsigned = [np.array(values, dtype=np.uint64).view(np.int64) for values in (seeds, keys)]
        threads = *unsigned, np.array(sampled, dtype=np.int64), *bits
        modes = Modes(control, any(sampled), any(epsilon >= 0 for epsilon, _ in limits))
        segments, places = forest.verified, np.concatenate(positions)
        return cls(verify, depth, drafting, modes, segments, served, first_rows, rows, threads, places, processed)

    @property
    def operations(self) -> tuple | None:
        """What runs, as a key for captured steps; None where it cannot be captured."""
        return None if self.processed else (self.depth, self.drafting and self.drafting.key, self.modes)

    @property
    def num_threads(self) -> int:
        return len(self.first_rows) - 1

    def inputs(self, queries: int | None = None, threads: int | None = None) -> Tensor:
        """All that `run` reads, on the CPU, int64: for exactly these segments, or padded to more rows and threads."""
        queries = len(self.rows[0]) if queries is None else queries
        threads = self.num_threads if threads is None else threads
        parts = [*self.rows, self.first_rows]
        if self.modes.noise:
            parts += [*self.threads[:3], self.positions]
        if self.modes.typical:
            parts += self.threads[3:]
        parts += [change.words for change in self._changes()]
        sizes = self._sizes(queries, threads)
        return torch.from_numpy(np.concatenate([_grown(*pair) for pair in zip(parts, sizes, strict=True)]))

    def _sizes(self, queries: int, threads: int) -> list[int]:
        """Even ones: Triton compiles a kernel anew for addresses that are no multiples of 16 bytes."""
        sizes = [queries, queries, queries, threads + 1]
        if self.modes.noise:
            sizes += [threads, threads, threads, queries]
        if self.modes.typical:
            sizes += [threads, threads]
        return [*(size + size % 2 for size in sizes), *(change.num_words for change in self._changes())]

    def _changes(self) -> list[PathChange | MaskChange]:
        return [change for _, _, changes in self.processed for change in changes if change is not None]

    def run(self, logits: Tensor, hidden: Tensor, inputs: Tensor, threads: int | None = None) -> Tensor:
        """logits [M, vocab], hidden [M, input_size] and `inputs` on their device -> int32 for `read`, [T, *]."""
        queries = len(logits)
        threads = self.num_threads if threads is None else threads
        tokens, parents, bans, first_rows, *others = inputs.split(self._sizes(queries, threads))
        if self.processed:
            count = len(self._changes())
            others, words = others[: len(others) - count], iter(others[len(others) - count :])
            logits = logits.to(torch.float32, copy=True)  # the model's own tell whose fault an impossible token is
            for first, segment, changes in self.processed:
                sampler, own = segment.request.sampler, slice(first, first + 1 + len(segment.draft_tokens))
                ways = [change and partial(change, words=next(words)) for change in changes]
                try:
                    logits[own] = sampler.process(logits[own], sampler.fork_bans(segment), ways)
                except ValueError as error:  # of a bias of tokens that there are not; it ends this request alone
                    segment.request.error = error
        noise = typical = None
        if self.modes.noise:
            seeds, keys, sampled, positions, *others = others
            noise = Noise(seeds[:threads], keys[:threads], positions[:queries], sampled[:threads].int())
        if self.modes.typical:
            typical = torch.stack([bits[:threads].view(torch.float64) for bits in others], dim=1).float()
        verified = self.verify(
            *(
                logits,
                *(part[:queries].int() for part in (tokens, parents)),
                first_rows[: threads + 1].int(),
                self.depth,
            ),
            bans=bans[:queries].int(),
            control=self.modes.control,
            noise=noise,
            typical=typical,
        )
        if self.drafting is None:
            return verified.packed
        # Threads that only fill a size up have chosen nothing: theirs may be any row and token.
        last = (verified.lengths.long() - 1).clamp(min=0)
        roots = verified.tokens.gather(1, last[:, None])[:, 0].long().clamp(min=0)
        states = hidden[verified.last_rows.long().clamp(min=0)]
        assert not isinstance(self.drafting.drafter, AttendingDrafter)
        guesses, log_probs = self.drafting.drafter.propose(states, roots, self.drafting.tree)
        drafted = guesses.to(torch.int32), log_probs.float().contiguous().view(torch.int32)
        return torch.cat([verified.packed, *drafted], dim=1)

    def read(self, chosen: Tensor) -> list[VerifyResult | None]:
        """A result per verified segment, with what was drafted behind each: the one wait for the device. None where
        the host verifies."""
        read = chosen[: self.num_threads].cpu()
        nodes = 0 if self.drafting is None else len(self.drafting.tree)
        width = read.shape[1] - 2 * nodes
        verified = Verified(read[:, :width])
        columns = (part.tolist() for part in (verified.lengths, verified.last_rows, verified.tokens, verified.rows))
        every = [
            VerifyResult(tokens[:length], [row - first - 1 for row in rows[: length - 1]], last)
            for first, length, last, tokens, rows in zip(self.first_rows.tolist(), *columns, strict=False)
        ]
        if nodes:
            guesses, log_probs = read[:, width : width + nodes].numpy(), read[:, width + nodes :].contiguous()
            for result, ids, chances in zip(every, guesses, log_probs.view(torch.float32).numpy(), strict=True):
                result.drafted = ids.astype(np.int64), chances
        results: list[VerifyResult | None] = []
        place = 0
        for segment, served in zip(self.segments, self.served, strict=True):
            results.append(every[place] if served else None)
            every[place].children = dict(zip(segment.forks, every[place + 1 :], strict=False))
            place += 1 + len(segment.forks)
        return results


def _grown(array: np.ndarray, length: int) -> np.ndarray:
    """Filled up with its last entry: for `first_rows` that is a thread without rows, elsewhere nobody looks."""
    return array if len(array) == length else np.concatenate([array, np.full(length - len(array), array[-1])])
