"""Medusa heads from one file layout into another, bit for bit.

Layouts are those of `checkpoints.py`. Tensors are renamed, never recomputed: what a target cannot express is refused
with a sentence. Two things come and go on the way:

- The base's unembedding. V2 heads use the base's own; vLLM's layout holds one copy of it, V1 and APAR one per head.
  It is read from the base where a target needs it, marked in the config (`original_lm_head`), and dropped on the way
  back.
- Biases of zero. vLLM's blocks may have none, all other layouts must; the config remembers (`medusa_fc_bias`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from medusa_apar.job import write_text
from medusa_apar.models import head_files
from medusa_apar.models.base_model import Base, model_shards
from medusa_apar.models.model_folder import check_empty, new_model_folder
from medusa_apar.reading import expanded, reading

from . import checkpoints
from .checkpoints import HeadFile

LAYOUTS = ("v1", "v2", "vllm", "medusa2", "apar")
DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("safetensors", "pt")
MODEL_TEXT = (".json", ".jinja", ".model", ".txt", ".py")  # what a model folder holds besides its weights


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


def convert(
    source: str | Path,
    to: str,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    file_format: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Summary, Summary, list[str]]:
    """Heads of `source` (folder, file or Hub id) in layout `to`, written into folder `out`.

    base: the model the heads sit on, for targets that need its unembedding or its weights; None: as the heads' config
        says.
    dtype: of all floating point tensors written; None keeps each one's own.
    file_format: safetensors or pt; None: pt for APAR, whose own code reads nothing else, safetensors otherwise.
    force: replace heads, or for "medusa2" a model, that lie in `out` already.
    trust_remote_code: whether code from the base's repository may run.

    Returns what was read, what was written, and what the user should know. ValueError: the target cannot hold these
    heads, or the files are broken. FileNotFoundError: no heads. FileExistsError: `out` is in use. Nothing is written
    in any of these cases.
    """
    out = expanded(out)
    name = _file_name(to, file_format)
    folder = out / head_files.SUBFOLDER if to == "apar" else out
    heads = read(source)
    given = Base(base, trust_remote_code) if base else None
    _check_free(folder, to, force, heads, given)
    target = _in_layout(heads, to, given, trust_remote_code)
    state = _state_dict(target, to, name)
    config = _config(target, to, folder)
    if to == "medusa2":
        owner = given or _own_base(heads, "a medusa2 model holds its weights", trust_remote_code)
        _write_full_model(out, state, config, dtype, owner)
    else:
        checkpoints.write(folder, state, config, dtype, name)
        for other in head_files.FILES:  # of an earlier run in another format, which would be read first
            if other != name:
                (folder / other).unlink(missing_ok=True)
    written = _summary(target, to, dtype, out, state)
    return _summary(heads, heads.layout, None, Path(source), None), written, heads.notes


def read(source: str | Path) -> Heads:
    """The heads of a folder, file or Hub repository in any layout, with nothing lost."""
    if not str(source):
        raise ValueError("the name of the heads is empty")
    path = expanded(source)
    if not path.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        raise FileNotFoundError(f"{source} is no file, folder or Hub id")
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


# ---- what a target can hold


def _in_layout(heads: Heads, to: str, given: Base | None, trust_remote_code: bool) -> Heads:
    """The same heads with the unembeddings that layout `to` has. ValueError: it cannot hold them."""
    file = heads.file
    if file.token_map is not None and to in ("medusa2", "apar"):
        raise ValueError(
            f"these heads draft from {len(file.token_map)} of the vocabulary's tokens, and the {to} layout has no "
            "token_map to say which"
        )
    if file.token_map is not None and to in ("v1", "v2"):
        heads.notes.append("token_map is written along; in this layout only medusa-apar reads it.")
    if to == "apar" and not file.tied():
        raise ValueError(
            "a head's residual blocks differ, and the apar layout keeps one block for all of them: use --to v1"
        )
    if to == "v2" or (to == "medusa2" and not file.unembeddings):
        _check_against_base(heads, given, to)
        return _changed(heads, shared=None)
    if file.unembeddings:
        return heads
    shared = file.shared
    if shared is None:
        owner = given or _own_base(heads, f"the {to} layout holds a copy of its unembedding", trust_remote_code)
        shared = _draft_rows(owner.unembedding, file.token_map)
        heads.vocab_size = len(owner.unembedding)
    if to == "vllm":
        return _changed(heads, shared=shared)
    return _changed(heads, shared=shared, unembeddings=dict.fromkeys(range(file.num_heads), shared))


def _changed(heads: Heads, shared: Tensor | None, unembeddings: dict[int, Tensor] | None = None) -> Heads:
    old = heads.file
    file = HeadFile(old.blocks, unembeddings or {}, shared, old.token_map, old.num_heads, old.num_layers)
    return Heads(
        file, heads.layout, heads.folder, heads.base, heads.vocab_size, heads.has_bias, heads.extra, heads.notes
    )


def _check_against_base(heads: Heads, given: Base | None, to: str) -> None:
    """ValueError unless the heads' unembeddings are the base's, so that a layout without any loses nothing."""
    file = heads.file
    if file.unembeddings and given is None:
        raise ValueError(
            "every head has an unembedding of its own, which the v2 layout cannot hold (if they are copies of the "
            "base's, pass --base and they are compared)"
        )
    mine = [*file.unembeddings.values(), *([] if file.shared is None else [file.shared])]
    if mine and given is not None:
        rows = _draft_rows(given.unembedding, file.token_map)
        for tensor in mine:
            cut = _draft_rows(tensor, file.token_map)
            if cut.shape != rows.shape or not torch.equal(cut, rows.to(cut.dtype)):
                raise ValueError(
                    f"the heads' unembedding is not that of {given.name}, and the {to} layout would leave it out"
                )
    elif mine:
        heads.notes.append("lm_head.weight is left out: it is the base's, and the base serves.")


def _draft_rows(unembedding: Tensor, token_map: Tensor | None) -> Tensor:
    if token_map is None or len(unembedding) == len(token_map):
        return unembedding
    if int(token_map.max()) >= len(unembedding):
        raise ValueError(f"token_map names id {int(token_map.max())}, the base has {len(unembedding)} tokens")
    return unembedding[token_map.long()]


def _all_equal(tensors: dict[int, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors.values())


def _any_bit(tensor: Tensor) -> bool:
    """Whether any bit is set: a negative zero is not to be lost."""
    return bool(tensor.contiguous().view(torch.uint8).any())


# ---- how a target says it


def _state_dict(heads: Heads, to: str, name: str) -> dict[str, Tensor]:
    file, state = heads.file, {}
    for head, layer in product(range(file.num_heads), range(file.num_layers)):
        if to == "apar" and name.endswith(".safetensors") and layer:
            continue  # tied to block 0; safetensors writes no tensor twice
        block = file.blocks[head, layer]
        state[f"{head}.{layer}.linear.weight"] = block["weight"]
        if heads.has_bias or to != "vllm":
            weight = block["weight"]
            state[f"{head}.{layer}.linear.bias"] = block.get("bias", weight.new_zeros(len(weight)))
    for head, unembedding in file.unembeddings.items():
        state[f"{head}.{file.num_layers}.weight"] = unembedding
    if file.token_map is not None:
        state["token_map"] = file.token_map
    if to == "vllm":
        state = checkpoints.vllm_names(state)
        if file.shared is not None:
            state["lm_head.weight"] = file.shared
    if to == "medusa2":
        state = {f"medusa_head.{key}": tensor for key, tensor in state.items()}
    return state


def _config(heads: Heads, to: str, folder: Path) -> dict[str, Any]:
    file = heads.file
    own = {"base_model_name_or_path": heads.base} | heads.extra
    if not heads.has_bias:
        own["medusa_fc_bias"] = False
    if file.shared is not None:
        own["original_lm_head"] = True
    counts = {
        "version": "1" if file.unembeddings else "2",
        "medusa_num_heads": file.num_heads,
        "medusa_num_layers": file.num_layers,
    }
    if to == "medusa2":  # beside the entries of the base's config
        return counts | {key: value for key, value in own.items() if key != "base_model_name_or_path"}
    if to == "apar" and head_files.read_config(folder.parent).get("model_type"):
        own["base_model_name_or_path"] = ".."  # the model in whose folder the heads lie
    vocabulary = {} if heads.vocab_size is None else {"vocab_size": heads.vocab_size}
    if to != "vllm":
        return counts | {"hidden_size": file.hidden_size} | vocabulary | own
    if heads.vocab_size is None:
        raise ValueError("vLLM must be told the size of the vocabulary, which these heads do not say: pass --base")
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": file.hidden_size,
        "vocab_size": heads.vocab_size,
        "truncated_vocab_size": heads.vocab_size if file.token_map is None else len(file.token_map),
        "num_heads": file.num_heads,
        "num_hidden_layers": file.num_layers,
        "medusa_fc_bias": heads.has_bias,
        "original_lm_head": file.shared is not None,
    } | own


def _summary(heads: Heads, layout: str, dtype: torch.dtype | None, path: Path, state: dict | None) -> Summary:
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


# ---- where it goes


def _file_name(to: str, file_format: str | None) -> str:
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r} is not one of {', '.join(LAYOUTS)}")
    if file_format is not None and file_format not in FORMATS:
        raise ValueError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    if to in ("vllm", "medusa2"):
        if file_format == "pt":
            raise ValueError(f"the {to} layout is written as safetensors alone")
        return "model.safetensors"
    return f"medusa_lm_head.{file_format or ('pt' if to == 'apar' else 'safetensors')}"


def _check_free(folder: Path, to: str, force: bool, heads: Heads, given: Base | None) -> None:
    """FileExistsError or ValueError if writing into `folder` would destroy something."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder to write into")
    if to == "medusa2":
        if folder.is_dir() and folder.resolve() in (heads.folder.resolve(), given and given.local):
            raise ValueError(f"{folder} is what the model is made from: choose another folder")
        check_empty(folder, force)
        return
    if head_files.holds_model(folder):
        raise FileExistsError(f"{folder} holds a model, whose config.json stays: write into {folder / 'medusa'}")
    names = (*head_files.FILES, "model.safetensors") if to == "vllm" else head_files.FILES
    found = [name for name in (*names, "config.json") if (folder / name).exists()]
    inner = folder / head_files.SUBFOLDER
    if to == "vllm" and any((inner / name).exists() for name in head_files.FILES + head_files.FULL_MODEL_FILES):
        raise FileExistsError(f"{inner} holds heads, which would be read instead of new ones: choose another folder")
    if found and not force:
        raise FileExistsError(
            f"{folder} already holds {' and '.join(found)}: choose another folder, or force=True (--force)"
        )


def _write_full_model(out: Path, state: dict[str, Tensor], config: dict, dtype: torch.dtype | None, base: Base) -> None:
    """The base's weights shard by shard, the heads in a shard of their own, and all that the base's folder says."""
    folder = base.whole_model()
    shards = model_shards(folder)
    weight_map: dict[str, str] = {}
    size = 0
    with new_model_folder(out) as built:
        for number, shard in enumerate([*shards, None], start=1):
            name = f"model-{number:05}-of-{len(shards) + 1:05}.safetensors"
            tensors = state if shard is None else _without_heads(shard)
            checkpoints.save(tensors, built / name, dtype, safetensors=True)
            with safe_open(built / name, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), name)
            size += (built / name).stat().st_size
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in MODEL_TEXT and not path.name.endswith(".index.json"):
                shutil.copyfile(path, built / path.name)
        stale = {"version", "medusa_num_heads", "medusa_num_layers", "medusa_fc_bias", "original_lm_head", "acceptance"}
        whole = {key: value for key, value in head_files.read_config(folder).items() if key not in stale}
        if dtype is not None:
            whole["dtype"] = str(dtype).removeprefix("torch.")
            whole.pop("torch_dtype", None)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(built / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        write_text(built / "config.json", json.dumps(whole | config, indent=2) + "\n")


def _without_heads(shard: Path) -> dict[str, Tensor]:
    with reading(shard):
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if not checkpoints.PREFIX.match(key)}  # noqa: SIM118
        tensors = torch.load(shard, map_location="cpu", weights_only=True)
        return {key: tensor for key, tensor in tensors.items() if not checkpoints.PREFIX.match(key)}


def _own_base(heads: Heads, why: str, trust_remote_code: bool) -> Base:
    """The base that the heads' own folder or config names."""
    root = heads.folder.parent if heads.folder.name == head_files.SUBFOLDER else heads.folder
    config = head_files.read_config(root)
    if (root / "adapter_config.json").is_file() or config.get("model_type", "medusa") != "medusa":
        return Base(str(root), trust_remote_code)
    if not heads.base:
        raise ValueError(f"name the base model with --base: {why}, and the heads' config does not say which it is")
    return Base(heads.base, trust_remote_code)
