"""The kernels that choose tokens, verification and drafting: right or not, and how fast."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.draft import medusa_draft
from medusa_apar.triton_kernels.verify import VerifyWorkspace, verify

from .kernel_timing import measure


def check_verify(device: str, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    """Threads of 1 to 64 rows, kernel against reference: with bans and without; all greedy, all sampled, and a mixture
    of greedy, sampled, exact and typical threads in one launch."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 5, 33, 64] if device == "cuda" else [1, 3]
    first_rows = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    parents = torch.cat([torch.tensor([-1, *(first + n // 2 for n in range(size - 1))], dtype=torch.int32)
                         for first, size in zip(first_rows.tolist(), sizes, strict=False)])  # fmt: skip
    rows = len(parents)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    tokens = logits.float().argmax(-1).int()
    tokens = torch.where(parents < 0, tokens, tokens[parents.clamp(min=0).long()])  # each guess is right
    ids = torch.arange(len(sizes))
    sampled = reference.Noise(
        torch.full((len(sizes),), 7), ids, torch.arange(rows, dtype=torch.int64), torch.ones_like(ids).int()
    )
    some_sampled = sampled._replace(sampled=(ids % 2).int())
    typical = torch.tensor(reference.TypicalAcceptance()).repeat(len(sizes), 1)
    typical[(ids + 1) // 2 % 2 == 0, 0] = -1.0  # exact: the first and the last
    agree = True
    # The likeliest token of some rows is a fork, which half of those may not choose; of others a child.
    control = int(tokens[0]), int(tokens[-1])
    logits[::4, control[0]], logits[1::8, control[1]] = 20.0, 30.0
    bans = torch.arange(rows, dtype=torch.int32) // 4 % 2
    for noise, thresholds in ((None, None), (sampled, None), (some_sampled, typical)):
        on_device = noise and reference.Noise(*(tensor.to(device) for tensor in noise))
        for control_ids in (None, control):
            ours = verify(
                *(logits.to(device), tokens.to(device), parents.to(device), first_rows.to(device), 8),
                bans=bans.to(device),
                control=control_ids,
                noise=on_device,
                typical=None if thresholds is None else thresholds.to(device),
            )
            theirs = reference.verify(
                *(logits, tokens, parents, first_rows, 8),
                bans=bans,
                control=control_ids,
                noise=noise,
                typical=thresholds,
            )
            agree &= torch.equal(ours.packed.cpu(), theirs.packed)
    return {
        "kernel": "verify",
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "vocab": vocab,
        "equal": agree,
    }


def check_draft(device: str, dtype: torch.dtype, vocab: int) -> dict[str, Any]:
    """The likeliest tokens of four heads, kernel against reference, up to what the dtype's rounding can swap."""
    torch.manual_seed(0)
    hidden, heads, threads = (512, 4, 5) if device == "cuda" else (32, 2, 2)
    x = torch.randn(threads, hidden, device=device).to(dtype)
    weights = [(torch.randn(heads, hidden, hidden, device=device) / hidden**0.5).to(dtype)]
    biases = [torch.randn(heads, hidden, device=device).to(dtype)]
    rows = torch.randn(vocab, hidden, device=device).to(dtype)
    _, ours = medusa_draft(x, weights, biases, rows, k=8)
    _, theirs = reference.medusa_draft(x, weights, biases, rows, k=8)
    error = float((ours - theirs).abs().max())
    return {"kernel": "draft", "dtype": str(dtype).removeprefix("torch."), "vocab": vocab, "error": error}


def time_verify(rows: int, vocab: int, copy: float, device: str) -> dict[str, Any]:
    """Beside what it takes to read the logits once at a copy's bandwidth."""
    threads = max(1, rows // 8)
    first_rows = torch.arange(0, rows + 1, rows // threads, dtype=torch.int32, device=device)
    parents = torch.arange(-1, rows - 1, dtype=torch.int32, device=device)
    parents[first_rows[:-1].long()] = -1
    logits = torch.randn(rows, vocab, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = torch.zeros(rows, dtype=torch.int32, device=device)
    workspace = VerifyWorkspace.make(rows, threads, vocab, 8, device)
    found: dict[str, Any] = {"rows": rows, "vocab": vocab}
    noise = reference.Noise(
        torch.zeros(threads, dtype=torch.int64, device=device),
        torch.arange(threads, device=device),
        torch.arange(rows, device=device),
        torch.ones(threads, dtype=torch.int32, device=device),
    )
    for name, more in (("greedy", None), ("sampled", noise)):
        launch = partial(verify, logits, tokens, parents, first_rows, 8, noise=more, workspace=workspace)
        found[f"{name}_ms"] = measure(launch, device)
    found["read_once_ms"] = 1e3 * logits.nbytes / copy
    found["argmax_ms"] = measure(partial(torch.argmax, logits, dim=-1), device)
    return found


def time_draft(threads: int, vocab: int, device: str) -> dict[str, Any]:
    """Four Medusa heads of a Llama-8B, beside the same in torch."""
    hidden, heads = (4096, 4) if device == "cuda" else (32, 2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(threads, hidden, device=device).to(dtype)
    weight = (torch.randn(heads, hidden, hidden, device=device) / hidden**0.5).to(dtype)
    bias, rows = (
        torch.zeros(heads, hidden, device=device, dtype=dtype),
        torch.randn(vocab, hidden, device=device).to(dtype),
    )

    def in_torch() -> torch.Tensor:
        states = x + F.silu(F.linear(x, weight.view(-1, hidden), bias.view(-1))).view(threads, heads, hidden).transpose(
            0, 1
        )
        logits = (states @ rows.T).float()
        return logits.topk(8, dim=-1).values - logits.logsumexp(-1, keepdim=True)

    launch = partial(medusa_draft, x, [weight], [bias], rows, k=8)
    return {"threads": threads, "vocab": vocab, "ms": measure(launch, device), "torch_ms": measure(in_torch, device)}
