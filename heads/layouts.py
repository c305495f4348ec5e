"""Heads in no layout: read from any with nothing lost, told of in a line, and written where nothing is destroyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_apar.models import head_files
from medusa_apar.models.base_model import Base
from medusa_apar.reading import expanded, reading

from . import checkpoints
from .checkpoints import HeadFile
from .eagle3 import heads as eagle3

LAYOUTS = ("v1", "v2", "vllm", "medusa2", "apar")


@dataclass(slots=True)
class Heads:
    """A head file in no layout: what it holds and what its config adds."""

    file: HeadFile
    layout: str
    folder: Path  # in which the file lies
    base: str  # as the config names it, "" where it does not
    vocab_size: int | None
    has_bias: bool  # False: blocks of vLLM's kind, whose biases are absent or zero
    extra: dict[str, Any] = field(default_factory=dict)  # config entries that every layout keeps
    notes: list[str] = field(default_factory=list)  # what the user should know


@dataclass(frozen=True, slots=True)
class Summary:
    """One line about heads that were read or written."""

    layout: str
    heads: int
    layers: int
    draft_vocabulary: int | None
    vocabulary: int | None
    dtype: str
    bytes: int
    path: Path

    def __str__(self) -> str:
        counted = ((self.heads, "head"), (self.layers, "residual block"))
        counts = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in counted]
        whole = f" of {self.vocabulary}" if self.vocabulary and self.vocabulary != self.draft_vocabulary else ""
        drafts = (
            f"draft vocabulary {self.draft_vocabulary}{whole}" if self.draft_vocabulary else "the base's vocabulary"
        )
        parts = [self.layout, *counts, drafts, self.dtype, f"{self.bytes:,} bytes", str(self.path)]
        return ", ".join(parts)


def source_path(source: str | Path) -> Path:
    """Where a folder or a file lies; a Hub id as it is. FileNotFoundError: it is none of these."""
    if not str(source):
        raise ValueError("the name of the heads is empty")
    path = expanded(source)
    if not path.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        raise FileNotFoundError(f"{source} is no file, folder or Hub id")
    return path


def read(source: str | Path) -> Heads:
    """The heads of a folder, file or Hub repository in any layout, with nothing lost."""
    path = source_path(source)
    if eagle3.holds(path):
        raise ValueError(f"{source} holds an EAGLE-3 drafter: convert it --to eagle3 or --to speculators")
    files = checkpoints.find(path)
    folder = files[0].parent
    config = head_files.read_config(folder)
    if (kind := config.get("kind") or "medusa") != "medusa":
        raise ValueError(
            f"{source} holds {kind} heads, which exist in no other format: only Medusa heads can be converted"
        )
    state = checkpoints.read_files(files)
    with reading(source, "cannot be converted"):
        file = checkpoints.parse(state)
    layout = _layout(state, file, folder)
    marked = bool(config.get("original_lm_head"))
    notes = checkpoints.lies(config, file)
    if file.unembeddings and file.shared is not None:
        notes.append("lm_head.weight is left out: every head of the file has an unembedding of its own.")
        file.shared = None
    if marked and file.unembeddings and _all_equal(file.unembeddings):
        file.shared, file.unembeddings = file.unembeddings[0], {}
    rows = file.shared if file.shared is not None else file.unembeddings.get(0)
    vocab_size = config.get("vocab_size")
    if rows is not None and (file.token_map is None or len(rows) > len(file.token_map)):
        vocab_size = len(rows)
    zero = not any("bias" in block and _any_bit(block["bias"]) for block in file.blocks.values())
    absent = not any("bias" in block for block in file.blocks.values())
    base = config.get("base_model_name_or_path") or ""
    if layout == "medusa2":
        base = str(source if not path.exists() else folder.resolve())
    elif base and (folder / base).exists():
        base = str((folder / base).resolve())
    return Heads(
        file=file,
        layout=layout,
        folder=folder,
        base=base,
        vocab_size=vocab_size,
        has_bias=not (absent or (zero and config.get("medusa_fc_bias") is False)),
        extra={"acceptance": config["acceptance"]} if config.get("acceptance") else {},
        notes=notes,
    )


def _layout(state: dict[str, Tensor], file: HeadFile, folder: Path) -> str:
    if any(checkpoints.PREFIX.match(key) for key in state):
        return "medusa2"
    if any(key.startswith(("blocks.", "lm_heads.")) for key in state):
        return "vllm"
    if not file.unembeddings:
        return "v2"
    return "apar" if folder.name == head_files.SUBFOLDER and file.tied() else "v1"


def draft_rows(unembedding: Tensor, token_map: Tensor | None) -> Tensor:
    """The rows of the draft vocabulary, of an unembedding that may hold the whole one's. ValueError: it has too few."""
    if token_map is None or len(unembedding) == len(token_map):
        return unembedding
    return unembedding[known_ids(token_map, len(unembedding))]


def known_ids(token_map: Tensor, vocab_size: int) -> Tensor:
    """A token_map as indices of so many rows. ValueError: it names others."""
    if int(token_map.max()) >= vocab_size:
        raise ValueError(f"token_map names id {int(token_map.max())}, the base has {vocab_size} tokens")
    return token_map.long()


def bias_of(block: Mapping[str, Tensor]) -> Tensor:
    """A residual block's bias, zero where it has none."""
    weight = block["weight"]
    return block.get("bias", weight.new_zeros(len(weight)))


def _all_equal(tensors: dict[int, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors.values())


def _any_bit(tensor: Tensor) -> bool:
    """Whether any bit is set: a negative zero is not to be lost."""
    return bool(tensor.contiguous().view(torch.uint8).any())


def summary(
    heads: Heads, layout: str, path: Path, state: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> Summary:
    """state: the tensors that were written, in `dtype` where that is one; None: those that were read."""
    file = heads.file
    if state is None:
        blocks = [tensor for block in file.blocks.values() for tensor in block.values()]
        rest = [*file.unembeddings.values(), file.shared, file.token_map]
        tensors = blocks + [tensor for tensor in rest if tensor is not None]
    else:
        tensors = [
            tensor.to("meta", dtype) if dtype and tensor.is_floating_point() else tensor for tensor in state.values()
        ]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    return Summary(
        layout=layout,
        heads=file.num_heads,
        layers=file.num_layers,
        draft_vocabulary=heads.vocab_size if file.token_map is None else len(file.token_map),
        vocabulary=heads.vocab_size,
        dtype=" and ".join(dtypes),
        bytes=sum(tensor.nbytes for tensor in tensors),
        path=path,
    )


def own_base(heads: Heads, why: str, trust_remote_code: bool) -> Base:
    """The base that the heads' own folder or config names."""
    root = heads.folder.parent if heads.folder.name == head_files.SUBFOLDER else heads.folder
    config = head_files.read_config(root)
    if (root / "adapter_config.json").is_file() or config.get("model_type", "medusa") != "medusa":
        return Base(str(root), trust_remote_code)
    if not heads.base:
        raise ValueError(f"name the base model with --base: {why}, and the heads' config does not say which it is")
    return Base(heads.base, trust_remote_code)


def check_free(folder: Path, names: Sequence[str], force: bool) -> None:
    """FileExistsError if heads written into `folder` would destroy something; names: of files that may hold heads."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder to write into")
    if head_files.holds_model(folder):
        raise FileExistsError(f"{folder} holds a model, whose config.json stays: write into {folder / 'medusa'}")
    found = [name for name in (*names, "config.json") if (folder / name).exists()]
    if found and not force:
        raise FileExistsError(
            f"{folder} already holds {' and '.join(found)}: choose another folder, or force=True (--force)"
        )


def write_alone(
    folder: Path, state: Mapping[str, Tensor], config: Mapping, dtype: torch.dtype | None, name: str
) -> None:
    """Heads into `folder`, without those of an earlier run in another format, which would be read first."""
    checkpoints.write(folder, state, config, dtype, name)
    for other in head_files.FILES:
        if other != name:
            (folder / other).unlink(missing_ok=True)
