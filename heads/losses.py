"""What heads are trained on and judged by: losses over windows of positions, held-out figures, the ridge start."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import DraftHeads, HydraHeads
from .answers import Answers, Store

WINDOW = 256  # positions whose logits exist at once: 8 MB per head at 8192 ids
RANKS = 10  # guesses per head that are counted
TOPS = (1, 3, 5)
RIDGE_POSITIONS = 200_000  # many times as many as a layer has inputs
RIDGE = 1e-2  # of an input's own mean square


def window_losses(
    heads: DraftHeads, part: Answers, hard: float = 0.0, temperature: float = 1.0, counted: int | None = None
) -> tuple[Tensor, Tensor]:
    """Per head, summed cross-entropy and number of positions ([heads] each) of contiguous positions `part`.

    counted: only so many of the first, the others being there to be looked ahead at; None: all.
    """
    with torch.no_grad():
        targets = heads.unembed(part.hidden[:, : heads.hidden_size]).float()
        targets = targets.div_(temperature).softmax(-1)  # [T, draft vocabulary]
        if hard:
            targets = targets.mul_(1 - hard) + hard * _one_hot(heads, part.next_ids)
    states = heads.states(part.hidden, part.drafted(heads.num_heads))
    losses, counts = [], []
    for head in range(heads.num_heads):
        ahead = 1 + head
        same_thread = part.same_thread(ahead)
        if counted is not None:
            same_thread[counted:] = False
        logits = heads.unembed(states[head, :-ahead]).float()
        losses.append((F.cross_entropy(logits, targets[ahead:], reduction="none") * same_thread).sum())
        counts.append(same_thread.sum())
    return torch.stack(losses), torch.stack(counts)


def _one_hot(heads: DraftHeads, ids: Tensor) -> Tensor:
    """[T] ids -> [T, draft vocabulary]; a row of zeros where an id is not in it."""
    vocabulary = heads.token_map
    if vocabulary is None:
        vocabulary = torch.arange(heads.vocab_size, device=ids.device)
    return (ids[:, None] == vocabulary).float()


@torch.no_grad()
def evaluate(heads: DraftHeads, answers: Answers, greedy: Tensor) -> dict[str, list[float]]:
    """Loss per head; how often `greedy`, the base's own choice [T], is among a head's first 1, 3 and 5.

    `heads.acceptance` becomes the share of every rank: what draft trees are made from. A Hydra head counts where the
    tokens before it are the thread's own, as they are below an accepted node.
    """
    ranks = min(RANKS, heads.draft_vocab_size)
    total = torch.zeros(2 + ranks, heads.num_heads, dtype=torch.double)
    device = next(heads.parameters()).device
    for start in range(0, len(answers), WINDOW):
        end = start + WINDOW + heads.num_heads
        part, chosen = answers[start:end].to(device), greedy[start:end].to(device)
        losses, counts = window_losses(heads, part, counted=WINDOW)
        total[:2] += torch.stack([losses.cpu(), counts.cpu()]).double()
        token_ids, _ = heads.guess(part.hidden, part.drafted(heads.num_heads), ranks)
        for head in range(heads.num_heads):
            ahead = 1 + head
            hits = (token_ids[:-ahead, head] == chosen[ahead:, None])[:WINDOW][part.same_thread(ahead)[:WINDOW]]
            total[2:, head] += hits.sum(0).cpu()
    means = total / total[1].clamp(min=1)
    heads.acceptance = means[2:].T.tolist()
    return {"loss": means[0].tolist()} | {f"top{top}": means[2 : 2 + top].sum(0).tolist() for top in TOPS}


@torch.no_grad()
def ridge_start(heads: HydraHeads, store: Store, positions: int = RIDGE_POSITIONS) -> int:
    """Sets the input layer to the ridge regression of the final state at i+1+h on what head h reads at i.

    Returns the number of positions it was computed from; 0, and nothing is changed, where no thread is long enough.
    The inputs of head h are the first ones of head h+1, so one Gram matrix serves all heads.
    """
    size, count, device = heads.hidden_size, heads.num_heads, heads.bias.device
    tokens = count if heads.sequential else 0
    inputs = heads.input_size + 1 + tokens * size  # states, a one, embeddings
    gram = torch.zeros(inputs, inputs, dtype=torch.double, device=device)
    moments = torch.zeros(inputs, count * size, dtype=torch.double, device=device)
    used, step = 0, max(1, len(store) // max(1, positions)) * 1024
    for start in range(0, len(store), step):
        part = store[start : start + 1024 + count].to(device)
        valid = part.same_thread(count).nonzero()[:, 0]
        if not len(valid):
            continue
        states, drafted = part.hidden.float(), part.drafted(count)
        parts = [states[valid], torch.ones(len(valid), 1, device=device)]
        parts += [heads.embed(drafted[valid, token]).float() for token in range(tokens)]
        read = torch.cat(parts, dim=1)
        wanted = torch.cat([states[valid + 1 + head, :size] for head in range(count)], dim=1)
        gram += (read.T @ read).double()
        moments += (read.T @ wanted).double()
        used += len(valid)
    if not used:
        return 0
    diagonal = gram.diagonal()
    diagonal += RIDGE * diagonal + 1e-6 * diagonal.mean()
    for head in range(count):
        reads = heads.input_size + 1 + min(head + 1, tokens) * size
        weight = torch.linalg.solve(gram[:reads, :reads], moments[:reads, head * size : (head + 1) * size])
        heads.from_states[head] = weight[: heads.input_size].T
        heads.bias[head] = weight[heads.input_size]
        for token in range(min(head + 1, tokens)):
            first = heads.input_size + 1 + token * size
            heads.from_token[token][head - token] = weight[first : first + size].T
    return used
