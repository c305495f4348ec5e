"""Medusa head files as they are found in the wild, read into one normal form.

Layouts, told apart by their keys (h = head, l = residual block, L = number of blocks):

    V1       {h}.{l}.linear.weight|bias, {h}.{L}.weight     every head owns its unembedding
    V2       {h}.{l}.linear.weight|bias                     the base's unembedding serves all heads
    vLLM     blocks.{h}.layers.{l}.weight|bias, lm_heads.{h}.weight or lm_head.weight (the base's own, so V2)

any of them with `token_map` (truncated draft vocabulary) and, in Medusa-2 full models, behind a `medusa_head.` prefix.
Head counts come from the keys: configs in the wild say 2 over files that hold 5.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
FULL_MODEL_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
PREFIX = re.compile(r"^(?:.*\.)?medusa_heads?\.")

BLOCK = re.compile(r"(?:blocks\.)?(?P<head>\d+)\.(?:layers\.)?(?P<layer>\d+)\.(?:linear\.)?(?P<kind>weight|bias)")
VLLM_UNEMBEDDING = re.compile(r"lm_heads\.(?P<head>\d+)\.weight")


@dataclass(slots=True)
class HeadTensors:
    """What every layout says, stacked as `MedusaHeads` keeps it."""

    weight: Tensor  # [layers, heads, H, H]
    bias: Tensor  # [layers, heads, H]
    unembedding: Tensor | None  # [heads, draft vocabulary, H]; None: the base's serves (V2)
    token_map: Tensor | None  # [draft vocabulary] vocabulary ids; None: the whole vocabulary

    @property
    def num_heads(self) -> int:
        return self.weight.shape[1]

    @property
    def num_layers(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[-1]


def normalise(state: Mapping[str, Tensor]) -> HeadTensors:
    """State dict of any layout above -> stacked tensors."""
    if any(PREFIX.match(key) for key in state):
        state = {PREFIX.sub("", key): value for key, value in state.items() if PREFIX.match(key)}
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    unembeddings: dict[int, Tensor] = {}
    depths: dict[int, int] = {}  # blocks of a head, as its V1 unembedding's index tells
    for key, value in state.items():
        if key in ("token_map", "lm_head.weight"):
            continue
        if match := VLLM_UNEMBEDDING.fullmatch(key):
            unembeddings[int(match["head"])] = value
        elif match := BLOCK.fullmatch(key):
            head, layer = int(match["head"]), int(match["layer"])
            if key == f"{head}.{layer}.weight":
                unembeddings[head], depths[head] = value, layer
            else:
                blocks.setdefault((head, layer), {})[match["kind"]] = value
        else:
            raise ValueError(f"not a Medusa head file: it holds the key {key!r}.")
    return _stack(blocks, unembeddings, depths, state.get("token_map"))


def _stack(
    blocks: dict[tuple[int, int], dict[str, Tensor]],
    unembeddings: dict[int, Tensor],
    depths: dict[int, int],
    token_map: Tensor | None,
) -> HeadTensors:
    heads = sorted({head for head, _ in blocks} | set(unembeddings))
    blocks = {place: block for place, block in blocks.items() if "weight" in block}
    if not heads or heads != list(range(len(heads))):
        raise ValueError(f"Medusa heads must be numbered from 0 without gaps, the file has {heads}.")
    if unembeddings and len(unembeddings) != len(heads):
        raise ValueError(f"{len(unembeddings)} of {len(heads)} Medusa heads have an unembedding: need all or none.")
    counted = {head: max((layer + 1 for h, layer in blocks if h == head), default=0) for head in heads}
    layers = {max(counted[head], depths.get(head, 0)) for head in heads}
    if len(layers) > 1:
        raise ValueError(f"Medusa heads of different depth ({sorted(layers)} residual blocks) in one file.")
    num_layers = layers.pop()

    sample = next(iter(unembeddings.values())) if unembeddings else next(iter(blocks.values()))["weight"]
    weight = sample.new_zeros(num_layers, len(heads), sample.shape[-1], sample.shape[-1])
    bias = weight.new_zeros(weight.shape[:-1])
    for layer, head in product(range(num_layers), heads):
        block = _tied_block(blocks, head, layer)
        weight[layer, head] = block["weight"]
        if "bias" in block:
            bias[layer, head] = block["bias"]
    unembedding = torch.stack([unembeddings[head] for head in heads]) if unembeddings else None
    if token_map is not None:
        token_map = token_map.long()
        if unembedding is not None and unembedding.shape[1] > len(token_map):
            unembedding = unembedding[:, token_map]
    return HeadTensors(weight, bias, unembedding, token_map)


def _tied_block(blocks: dict[tuple[int, int], dict[str, Tensor]], head: int, layer: int) -> dict[str, Tensor]:
    """Block (head, layer). medusa-llm 0.1 ties a head's blocks, and writers that drop duplicates leave one of them."""
    if (head, layer) in blocks:
        return blocks[head, layer]
    kept = [block for (h, _), block in sorted(blocks.items(), key=lambda item: item[0]) if h == head]
    if len(kept) != 1:
        raise ValueError(f"Medusa head {head} lacks residual block {layer}.")
    return kept[0]


def state_dict(heads: HeadTensors) -> dict[str, Tensor]:
    """The inverse of `normalise`: V1 keys where heads own their unembedding, else V2."""
    state = {}
    for head in range(heads.num_heads):
        for layer in range(heads.num_layers):
            state[f"{head}.{layer}.linear.weight"] = heads.weight[layer, head]
            state[f"{head}.{layer}.linear.bias"] = heads.bias[layer, head]
        if heads.unembedding is not None:
            state[f"{head}.{heads.num_layers}.weight"] = heads.unembedding[head]
    if heads.token_map is not None:
        state["token_map"] = heads.token_map
    return state


def vllm_state_dict(heads: HeadTensors) -> dict[str, Tensor]:
    """The same in vLLM's naming. A shared unembedding is the caller's to add, as `lm_head.weight`."""
    state = {}
    for key, value in state_dict(heads).items():
        if match := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", key):
            key = f"blocks.{match[1]}.layers.{match[2]}.{match[3]}"
        elif match := re.fullmatch(r"(\d+)\.\d+\.weight", key):
            key = f"lm_heads.{match[1]}.weight"
        state[key] = value
    return state


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict]:
    """State dict and config ({} where there is none) of a directory, a file or a Hub repository."""
    path = Path(path)
    if not path.exists():
        path = _download(str(path))
    folder, files = path.parent, [path]
    if path.is_dir():
        folder, files = path, [path / name for name in FILES + FULL_MODEL_FILES if (path / name).exists()][:1]
        if not files:
            raise FileNotFoundError(
                f"no Medusa heads in {path}: none of {', '.join(FILES + FULL_MODEL_FILES)} is there."
            )
    if files[0].name.endswith(".index.json"):
        shards = json.loads(files[0].read_text())["weight_map"]
        files = sorted({folder / shard for key, shard in shards.items() if PREFIX.match(key)})
    config = folder / "config.json"
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_file(file)
    return state, json.loads(config.read_text()) if config.exists() else {}


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True)
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
        # A Medusa-2 file holds the whole base model too: read the heads alone.
        keys = [key for key in keys if PREFIX.match(key)] or keys
        return {key: tensors.get_tensor(key) for key in keys}


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=["config.json", *FILES]))
    if not any((folder / name).exists() for name in FILES):
        snapshot_download(repository, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"])
    return folder


def warn_if_config_lies(config: Mapping, heads: HeadTensors) -> None:
    for name, counted in (("medusa_num_heads", heads.num_heads), ("medusa_num_layers", heads.num_layers)):
        if config.get(name, counted) != counted:
            words = f"{name} is {config[name]} in the config but {counted} in the file, which counts."
            warnings.warn(words, stacklevel=3)


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping, dtype: torch.dtype, name: str = FILES[0]) -> None:
    """Tensors and config.json into `folder`, each replaced in one move, so that a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    temporary = folder / f".{name}.{os.getpid()}"
    save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / name)
    temporary = folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")
