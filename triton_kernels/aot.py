"""Compiles every variant of every kernel ahead of time, without a GPU, and holds what it costs against a table.

    python -m medusa_apar.triton_kernels.aot --check

A row of the tile table that does not compile, spills registers or does not fit into shared memory fails always. For the
triton version that `resources.json` was written with, registers, shared memory and instruction counts must be the
table's: a change of a kernel that costs something shows in review.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton

# Each has `variants() -> list[Variant]`.
MODULES = ("pack", "store", "tree_attention", "verify", "residual_blocks", "top_logits")
CAPABILITIES = (80, 90)
TABLE = Path(__file__).with_name("resources.json")

# Bytes of shared memory that one program may ask for, by compute capability (CUDA C++ Programming Guide, table 24,
# less the 1 KiB that CUDA keeps for itself).
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
_INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "LDL", "STL")  # tensor cores; asynchronous copies; spills
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a kernel is launched."""

    name: str
    kernel: Any  # the JITFunction
    signature: dict[str, str]  # "*bf16", "*i32", "i32", "fp32", ... by argument, without the constexprs
    constexprs: dict[str, Any]  # an argument that may be None is one of them when it is
    num_warps: int
    num_stages: int
    # Arguments that are multiples of 16, as launches see them: pointers of torch tensors, row strides. Without this
    # the compiler would read one value at a time, and the result would say nothing about the kernel that runs.
    divisible: Sequence[str] = ()


def variants() -> list[Variant]:
    found = [variant for module in MODULES for variant in import_module(f".{module}", __package__).variants()]
    assert len({variant.name for variant in found}) == len(found), "two variants share a name"
    return found


def compile_variant(variant: Variant, capability: int) -> dict[str, int]:
    """What the variant takes on this compute capability: registers and bytes of stack of a thread, bytes of shared
    memory of a program, and how often each of a few instructions stands in its code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    given = {**variant.signature, **dict.fromkeys(variant.constexprs, "constexpr")}
    if given.keys() != set(names):
        raise ValueError(f"{variant.name}: signature lacks or adds {sorted(given.keys() ^ set(names))}.")
    source = ASTSource(
        variant.kernel,
        {name: given[name] for name in names},
        variant.constexprs,
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible if name in variant.signature},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        # The default changes in triton 3.10: numbers should not move with the version.
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("nvdisasm", "-c", "-ndf", cubin)
    resources = {name: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for name, key in _USAGE.items()}  # type: ignore[index]
    resources["shared"] = compiled.metadata.shared
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE)
    assert operations, "nvdisasm writes its lines in another way than expected"
    return resources | {name: operations.count(name) for name in _INSTRUCTIONS}


_USAGE = {"registers": "REG", "stack": "STACK"}


def _run(tool: str, *arguments: Any) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def faults(capability: int, resources: dict[str, int]) -> list[str]:
    """What no variant may do, whatever the table says."""
    found = []
    if resources["stack"] or resources["LDL"] or resources["STL"]:
        found.append(f"spills: stack {resources['stack']} B, LDL {resources['LDL']}, STL {resources['STL']}")
    if resources["shared"] > SHARED_LIMITS[capability]:
        found.append(f"takes {resources['shared']} B of shared memory, limit {SHARED_LIMITS[capability]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medusa_apar.triton_kernels.aot", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, choices=sorted(SHARED_LIMITS))
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the result into resources.json")
    action.add_argument("--check", action="store_true", help="fail where the result is not the table's")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("nothing can be compiled while TRITON_INTERPRET is set.")

    version = ".".join(triton.__version__.split(".")[:2])
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = table.get(version, {})
    failures, result = [], {}
    for capability in options.capability:
        print(f"triton {version}, sm_{capability}\n{_HEADER}")
        for variant in variants():
            if options.only not in variant.name:
                continue
            name = f"sm_{capability} {variant.name}"
            try:
                resources = compile_variant(variant, capability)
            except Exception as error:  # the compiler raises anything
                failures.append(f"{name}: does not compile: {type(error).__name__}: {error}")
                continue
            result[name] = resources
            print(_line(variant, resources), flush=True)
            failures += [f"{name}: {fault}" for fault in faults(capability, resources)]
            if options.check and known and known.get(name) != resources:
                failures.append(f"{name}: the table says {known.get(name)}, now {resources}")
    if options.check and not options.only:
        compiled = tuple(f"sm_{capability} " for capability in options.capability)
        failures += [f"{name}: only in the table" for name in known if name.startswith(compiled) and name not in result]
    if options.write:
        table[version] = known | result if options.only else result
        lines = [
            f'  "{key}": {{\n' + ",\n".join(f'    "{name}": {json.dumps(row)}' for name, row in rows.items()) + "\n  }"
            for key, rows in sorted(table.items())
        ]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


_HEADER = f"{'variant':<44} warps stages registers stack shared B HMMA HGMMA LDGSTS LDL STL"


def _line(variant: Variant, resources: dict[str, int]) -> str:
    return (
        f"{variant.name:<44} {variant.num_warps:>5} {variant.num_stages:>6} {resources['registers']:>9} "
        f"{resources['stack']:>5} {resources['shared']:>8} {resources['HMMA']:>4} {resources['HGMMA']:>5} "
        f"{resources['LDGSTS']:>6} {resources['LDL']:>3} {resources['STL']:>3}"
    )


if __name__ == "__main__":
    sys.exit(main())
