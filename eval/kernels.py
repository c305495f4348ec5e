"""The kernels on this machine's GPU: right, and how fast beside what else can compute the same.

  python -m medusa_apar.eval.kernels --out DIR            (medusa-apar bench --kernels --out DIR does the same)

Every kernel is first compared with its torch reference over fresh random forests, in every dtype; nothing is timed
while one is wrong. Times are medians of triton's do_bench, which empties the L2 cache before each run. Bandwidth is
quoted as a share of a copy's on the same card, in the same run. DIR gets kernels.json and kernels.md.

--smoke runs the smallest cases only, also under TRITON_INTERPRET=1 on a CPU: what it then times means nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from medusa_apar.job import machine, write_text
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.tree_attention import INTERPRETED, tree_attention

from .kernel_choices import check_draft, check_verify, time_draft, time_verify
from .kernel_forests import OWN_TOKENS, SHAPES, Case, Problem, Shape
from .kernel_packing import check_pack, time_pack
from .kernel_timing import copy_bandwidth, host_ms, matmul_rate, measure, table

CASES = [
    *(Case(threads, 8, prefix) for prefix in (512, 4096, 32768) for threads in (1, 4, 16, 64)),
    *(Case(1, nodes, 4096) for nodes in (16, 64)),
    *(Case(16, nodes, 4096) for nodes in (1, 16)),
]
SMOKE = [Case(1, 3, 20), Case(2, 2, 40)]
CHECKED = [*SMOKE, Case(4, 8, 700), Case(16, 4, 300), Case(3, 64, 2000)]  # over several chunks, shared and not
CHECKED_SHAPES = (*SHAPES, Shape("odd", 6, 2, 80), Shape("wide", 4, 2, 256))
# Largest error against float64 that a dtype's rounding explains.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check_attention(device: str, shapes: Sequence[Shape], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Largest errors over shapes, cases and dtypes, split and walked; and whether both gave the same bits."""
    found = []
    for shape in shapes:
        for case in cases:
            for dtype in BOUNDS:
                problem = Problem.make(shape, case, dtype, device)
                layouts = [problem.layout(walk) for walk in (False, True)]
                tensors, q, k, v = ((problem.query, problem.keys, problem.values), *problem.doubles())
                for name, more in _options(problem).items():
                    split, walked = (tree_attention(*tensors, one, **more) for one in layouts)
                    error = float((split.double() - reference.tree_attention(q, k, v, layouts[0], **more)).abs().max())
                    found.append(
                        problem.describe()
                        | {"error": error, "bound": BOUNDS[dtype], "same_bits": bool(torch.equal(split, walked))}
                        | {"options": name}
                    )
    return found


def _options(problem: Problem) -> dict[str, dict[str, Any]]:
    """What families ask for beside the plain softmax. A window takes every draft node that `ancestors` says is seen."""
    sinks = torch.linspace(-1, 3, problem.shape.heads, device=problem.query.device).to(problem.query.dtype)
    return {
        "": {},
        "window": {"window": max(problem.case.prefix // 3, 1)},
        "cap, sinks": {"softcap": 2.0, "sinks": sinks, "window": problem.case.prefix + OWN_TOKENS},
    }


def time_attention(problem: Problem, copy: float, rate: float, flex: bool) -> dict[str, Any]:
    device = problem.query.device.type
    tensors = (problem.query, problem.keys, problem.values)
    row = problem.describe()
    for name, walk in (("split", False), ("walk", True)):
        row[f"{name}_ms"] = measure(partial(tree_attention, *tensors, problem.layout(walk)), device)
    best = min(row["split_ms"], row["walk_ms"])
    row["share_of_copy"] = problem.bytes / (best * 1e-3) / copy
    row["share_of_matmul"] = problem.flops / (best * 1e-3) / rate
    row["plan_ms"] = host_ms(lambda: problem.layout(False))
    return row | _peers(problem, device, flex)


def _peers(problem: Problem, device: str, flex: bool) -> dict[str, Any]:
    """The same result from SDPA with a dense mask and, on a GPU, compiled FlexAttention; keys already in order."""
    query = problem.query.transpose(0, 1)[None]
    keys, values = (pool.transpose(0, 1)[None].contiguous() for pool in (problem.keys, problem.values))
    mask = problem.mask()
    expected = tree_attention(problem.query, problem.keys, problem.values, problem.layout(False))

    def difference(result: torch.Tensor) -> float:
        return float((result[0].transpose(0, 1) - expected).abs().max())

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None], enable_gqa=True)

    found: dict[str, Any] = {"sdpa_ms": measure(sdpa, device), "sdpa_difference": difference(sdpa())}
    if flex:
        try:
            found |= _flex(query, keys, values, mask, difference)
        except Exception as error:  # a peer that fails is a fact to report, not an end
            found["flex_error"] = " ".join(str(error).split())[:300]
    return found


def _flex(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    difference: Callable[[torch.Tensor], float],
) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    def visible(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return mask[row, column]

    def blocks() -> BlockMask:
        return create_block_mask(visible, None, None, mask.shape[0], mask.shape[1], device="cuda")

    torch._dynamo.reset()  # past eight shapes it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = blocks()

    def run() -> torch.Tensor:
        return compiled(query, keys, values, block_mask=block_mask, enable_gqa=True)

    return {
        "flex_ms": measure(run, "cuda"),
        "flex_mask_ms": measure(blocks, "cuda"),
        "flex_difference": difference(run()),
    }


def run(out: Path, smoke: bool = False) -> dict[str, Any]:
    """ValueError where there is no GPU; RuntimeError if a kernel is wrong, once the report says which."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (smoke and INTERPRETED):
        raise ValueError("the kernels' benchmark needs a CUDA GPU, and there is none.")
    report: dict[str, Any] = {"machine": machine(), "smoke": smoke}
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    sections: list[tuple[str, list[dict[str, Any]]]] = []

    def write() -> None:
        report["sections"] = dict(sections)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "kernels.json", json.dumps(report, indent=1))
        text = [f"{report.get('gpu', 'CPU, interpreted: times mean nothing')}, {report['machine']}"]
        text += [f"## {name}\n\n{table(rows)}" for name, rows in sections]
        write_text(out / "kernels.md", "\n\n".join(text) + "\n")

    checks = check_attention(device, *((SHAPES[-1:], SMOKE) if smoke else (CHECKED_SHAPES, CHECKED)))
    sections.append(("Tree attention: errors against float64", checks))
    write()
    wrong = [check for check in checks if not check["error"] <= check["bound"]]
    vocab = 49_152 if device == "cuda" else 200
    others = [check(device, dtype, vocab) for check in (check_verify, check_draft) for dtype in BOUNDS]
    others += [check_pack(device, case) for case in (SMOKE if smoke else [*CHECKED, Case(64, 8, 4096)])]
    sections.append(("Verification, drafting, packing: against their references", others))
    write()
    wrong += [check for check in others if not check.get("equal", True) or not check.get("error", 0.0) <= 5e-2]
    if wrong:
        raise RuntimeError(f"{len(wrong)} results are wrong, so nothing was timed: see {out}/kernels.md")
    # Smoke runs are for sanitizers and interpreters, under which these would take minutes and mean nothing.
    copy, rate = (copy_bandwidth(device), matmul_rate(torch.bfloat16, device)) if not smoke else (1e12, 1e15)
    report |= {"copy_bytes_per_second": copy, "matmul_flops": rate}
    rows: list[dict[str, Any]] = []
    sections.append(("Tree attention: milliseconds a layer", rows))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape in SHAPES[-1:] if smoke else SHAPES:
        for case in SMOKE if smoke else CASES:
            rows.append(
                time_attention(Problem.make(shape, case, dtype, device), copy, rate, device == "cuda" and not smoke)
            )
            write()
    sizes = [(8, 49_152), (64, 49_152), (128, 128_256)] if not smoke else [(8, 500)]
    sections.append(("Verification: milliseconds", [time_verify(*size, copy, device) for size in sizes]))
    sizes = [(1, 32_768), (16, 32_768), (16, 128_256)] if not smoke else [(2, 200)]
    sections.append(("Four Medusa heads: milliseconds", [time_draft(*size, device) for size in sizes]))
    packed = SMOKE[:1] if smoke else [Case(1, 64, 4096), Case(16, 4, 32768), Case(32, 8, 4096)]
    sections.append(("Packing a step's forest: milliseconds", [time_pack(case, device) for case in packed]))
    write()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="the smallest cases only")
    args = parser.parse_args()
    run(args.out, args.smoke)
    print((args.out / "kernels.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
