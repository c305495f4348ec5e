"""Medusa head files as they are found in the wild, read into one normal form.

Layouts, told apart by their keys (h = head, l = residual block, L = number of blocks):

    V1       {h}.{l}.linear.weight|bias, {h}.{L}.weight     every head owns its unembedding
    V2       {h}.{l}.linear.weight|bias                     the base's unembedding serves all heads
    vLLM     blocks.{h}.layers.{l}.weight|bias, lm_heads.{h}.weight or lm_head.weight (the base's own, so V2)
    APAR     V1 in a `medusa/` subfolder of the model, one residual block standing for all of a head's blocks

any of them with `token_map` (truncated draft vocabulary) and, in Medusa-2 full models, behind a `medusa_head.` prefix.
Head counts come from the keys: configs in the wild say 2 over files that hold 5.

`parse` loses nothing of a file (`convert.py` needs that), `normalise` stacks it as `MedusaHeads` keeps it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa_apar.job import replacing, write_text
from medusa_apar.models.head_files import FILES, FULL_MODEL_FILES, SUBFOLDER, read_config
from medusa_apar.reading import MAX_HEADS, MAX_LAYERS, expanded, reading, shards

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
PREFIX = re.compile(r"^(?:.*\.)?medusa_heads?\.")

BLOCK = re.compile(
    r"(?:blocks\.)?(?P<head>\d{1,9})\.(?:layers\.)?(?P<layer>\d{1,9})\.(?:linear\.)?(?P<kind>weight|bias)"
)
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


@dataclass(slots=True)
class HeadFile:
    """A head file's tensors by what they are, each as it lies in the file: nothing cast, cut or copied."""

    blocks: dict[tuple[int, int], dict[str, Tensor]]  # (head, block) -> weight [H, H] and, where there is one, bias [H]
    unembeddings: dict[int, Tensor]  # head -> [draft or whole vocabulary, H]; empty: the base's serves
    shared: Tensor | None  # the base's unembedding, of which vLLM's layout holds a copy
    token_map: Tensor | None  # [draft vocabulary]
    num_heads: int
    num_layers: int

    @property
    def hidden_size(self) -> int:
        return self.sample.shape[-1]

    @property
    def sample(self) -> Tensor:
        return next(iter(self.unembeddings.values())) if self.unembeddings else self.blocks[0, 0]["weight"]

    def tied(self) -> bool:
        """Whether each head's residual blocks are one block repeated."""
        first_blocks = [self.blocks[head, 0] for head in range(self.num_heads)] if self.num_layers else []
        return all(
            self.blocks[head, layer].keys() == first.keys()
            and all(torch.equal(self.blocks[head, layer][kind], first[kind]) for kind in first)
            for head, first in enumerate(first_blocks)
            for layer in range(1, self.num_layers)
        )


def normalise(state: Mapping[str, Tensor]) -> HeadTensors:
    """State dict of any layout above -> stacked tensors. ValueError: not Medusa heads, or broken ones."""
    return stack(parse(state))


def parse(state: Mapping[str, Tensor]) -> HeadFile:
    """State dict of any layout above -> its tensors by head and block. ValueError: not Medusa heads, or broken ones.

    A block that its writer left out because it is tied to another appears as that other, the very same tensor.
    """
    if any(PREFIX.match(key) for key in state):
        state = {PREFIX.sub("", key): value for key, value in state.items() if PREFIX.match(key)}
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    unembeddings: dict[int, Tensor] = {}
    depths: dict[int, int] = {}  # blocks of a head, as its V1 unembedding's index tells
    for key, value in state.items():
        check_dense(key, value)
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
    heads = sorted({head for head, _ in blocks} | set(unembeddings))
    deepest = max([layer + 1 for _, layer in blocks] + list(depths.values()), default=0)
    check_counts(len(heads), deepest)
    blocks = {place: block for place, block in blocks.items() if "weight" in block}
    if not heads or heads != list(range(len(heads))):
        raise ValueError(f"Medusa heads must be numbered from 0 without gaps, the file has {heads}.")
    shared = state.get("lm_head.weight")
    if len(heads) > 1 and list(unembeddings) == [0] and "lm_heads.0.weight" in state:  # vLLM's other name for it
        shared, unembeddings = unembeddings[0], {}
    if unembeddings and len(unembeddings) != len(heads):
        raise ValueError(f"{len(unembeddings)} of {len(heads)} Medusa heads have an unembedding: need all or none.")
    counted = {head: max((layer + 1 for h, layer in blocks if h == head), default=0) for head in heads}
    layers = {max(counted[head], depths.get(head, 0)) for head in heads}
    if len(layers) > 1:
        raise ValueError(f"Medusa heads of different depth ({sorted(layers)} residual blocks) in one file.")
    num_layers = layers.pop()
    blocks = {(head, layer): _tied_block(blocks, head, layer) for head, layer in product(heads, range(num_layers))}
    file = HeadFile(blocks, unembeddings, shared, state.get("token_map"), len(heads), num_layers)
    _check_shapes(file)
    return file


def check_counts(heads: int, layers: int) -> None:
    """ValueError for more than a file may hold, be it read or written."""
    if heads > MAX_HEADS or layers > MAX_LAYERS:
        raise ValueError(
            f"{heads} draft heads of {layers} residual blocks: a file holds at most {MAX_HEADS} of {MAX_LAYERS}."
        )


def check_dense(key: str, tensor: Tensor) -> None:
    """ValueError unless the file holds every number of a tensor: an expanded one is larger than its file."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise ValueError(f"{key!r} in a head file is no dense tensor.")


def _check_shapes(file: HeadFile) -> None:
    if not file.sample.dim() or not file.sample.is_floating_point():
        raise ValueError(f"a tensor of a Medusa head is {file.sample.dtype} of shape {list(file.sample.shape)}.")
    hidden = file.sample.shape[-1]
    for (head, layer), block in file.blocks.items():
        for kind, tensor in block.items():
            if not tensor.is_floating_point():
                raise ValueError(f"block {layer} of Medusa head {head} has a {kind} of dtype {tensor.dtype}.")
            if list(tensor.shape) != ([hidden, hidden] if kind == "weight" else [hidden]):
                raise ValueError(
                    f"block {layer} of Medusa head {head} has a {kind} of shape {list(tensor.shape)}, "
                    f"but the hidden size is {hidden}."
                )
    unembeddings = [*file.unembeddings.values(), *([] if file.shared is None else [file.shared])]
    if len({tuple(tensor.shape) for tensor in unembeddings}) > 1 or any(
        tensor.dim() != 2 or tensor.shape[-1] != hidden or not tensor.is_floating_point() for tensor in unembeddings
    ):
        raise ValueError(f"unembeddings of shapes {[list(tensor.shape) for tensor in unembeddings]} in one head file.")
    token_map = file.token_map
    if token_map is None:
        return
    if token_map.dim() != 1 or token_map.dtype not in INTEGERS or not len(token_map) or int(token_map.min()) < 0:
        raise ValueError(f"token_map is {token_map.dtype} of shape {list(token_map.shape)}, must be a list of ids.")
    for tensor in unembeddings:
        if len(tensor) < len(token_map) or (len(tensor) > len(token_map) and int(token_map.max()) >= len(tensor)):
            raise ValueError(f"token_map does not fit an unembedding of {len(tensor)} rows.")


def stack(file: HeadFile) -> HeadTensors:
    """A file's tensors as `MedusaHeads` keeps them: missing biases are zero, an unembedding has the draft rows alone.

    Tensors of different dtypes are stacked in the one that holds them all.
    """
    places = list(product(range(file.num_layers), range(file.num_heads)))
    kinds = {tensor.dtype for block in file.blocks.values() for tensor in block.values()} or {file.sample.dtype}
    shape = file.num_layers, file.num_heads, file.hidden_size, file.hidden_size
    weight = file.sample.new_zeros(shape, dtype=reduce(torch.promote_types, kinds))
    bias = weight.new_zeros(weight.shape[:-1])
    for layer, head in places:
        block = file.blocks[head, layer]
        weight[layer, head] = block["weight"]
        if "bias" in block:
            bias[layer, head] = block["bias"]
    rows = file.unembeddings
    unembedding = torch.stack([rows[head] for head in range(file.num_heads)]) if rows else None
    token_map = file.token_map
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


# ---- files


def read(path: str | os.PathLike[str], token: str | bool | None = None) -> tuple[dict[str, Tensor], dict]:
    """State dict and config ({} where there is none) of a directory, a file or a Hub repository."""
    files = find(path, token)
    return read_files(files), read_config(files[0].parent)


def find(path: str | os.PathLike[str], token: str | bool | None = None) -> list[Path]:
    """The files that hold the heads of a directory, a file or a Hub repository; a config lies beside them.

    FileNotFoundError: there are none.
    """
    file = path = locate(path, token)
    if path.is_dir():
        # A model directory with a `medusa/` folder keeps its heads there: its own weights come last.
        places = [*FILES, *(f"{SUBFOLDER}/{name}" for name in FILES + FULL_MODEL_FILES), *FULL_MODEL_FILES]
        found = [path / name for name in places if (path / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"no Medusa heads in {path}: none of {', '.join(FILES + FULL_MODEL_FILES)} is there."
            )
        file = found[0]
    if not file.name.endswith(".index.json"):
        return [file]
    placed = shards(file)
    return sorted({placed[key] for key in _head_keys(placed, file)})


def read_files(files: Iterable[Path]) -> dict[str, Tensor]:
    """Their tensors, of a Medusa-2 model the heads' alone. Pickles run no code. ValueError: a file is damaged."""
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_file(file)
    return state


def _head_keys(keys: Iterable[str], file: Path) -> list[str]:
    """A Medusa-2 file or index names the whole base model too: the keys of the heads alone."""
    keys = list(keys)
    if prefixed := [key for key in keys if PREFIX.match(key)]:
        return prefixed
    heads_alone = any(BLOCK.fullmatch(key) or VLLM_UNEMBEDDING.fullmatch(key) for key in keys)
    if file.name in FULL_MODEL_FILES and not heads_alone:
        raise FileNotFoundError(f"no Medusa heads in {file}: it is a model without any.")
    return keys


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with reading(file), safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
        keys = _head_keys(keys, file)
        with reading(file), safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in keys}
    with reading(file, "is no plain file of tensors"):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} is no plain file of tensors: it holds a {type(state).__name__} of something else")
    if other := next((key for key in state if not isinstance(key, str)), None):
        raise ValueError(f"{file} is no plain file of tensors: it names one of them {other!r}")
    return {key: state[key] for key in _head_keys(state, file)}


def locate(path: str | os.PathLike[str], token: str | bool | None = None) -> Path:
    """The directory or file, or where a Hub repository's files lie."""
    if not os.fspath(path).strip():
        raise ValueError("the name of the heads is empty")
    local = expanded(path)
    return local if local.exists() else _download(str(local), token)


def _download(repository: str, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    heads_alone = ["config.json", *FILES, f"{SUBFOLDER}/*"]
    folder = Path(snapshot_download(repository, token=token, allow_patterns=heads_alone))
    if not any((folder / place / name).exists() for place in (".", SUBFOLDER) for name in FILES):
        whole_model = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        snapshot_download(repository, token=token, allow_patterns=whole_model)
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repository, token=token, allow_patterns=["pytorch_model*.bin*"])
    return folder


def lies(config: Mapping, heads: HeadTensors | HeadFile) -> list[str]:
    """A sentence for each count that the config gets wrong."""
    names = {"medusa_num_heads": heads.num_heads, "medusa_num_layers": heads.num_layers}
    if config.get("model_type") == "medusa":  # vLLM's; in any other config these count the base's layers
        names |= {"num_heads": heads.num_heads, "num_hidden_layers": heads.num_layers}
    return [
        f"{name} is {config[name]} in the config but {counted} in the file, which counts."
        for name, counted in names.items()
        if config.get(name, counted) != counted
    ]


def warn_if_config_lies(config: Mapping, heads: HeadTensors) -> None:
    for words in lies(config, heads):
        warnings.warn(words, stacklevel=3)


def write(
    folder: Path, state: Mapping[str, Tensor], config: Mapping, dtype: torch.dtype | None, name: str = FILES[0]
) -> None:
    """Tensors and config.json into `folder`, each replaced in one move, so that a reader never sees half a file.

    dtype: of all floating point tensors; None keeps each one's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as temporary:
        save(state, temporary, dtype, name.endswith(".safetensors"))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None, safetensors: bool) -> None:
    """One file of tensors. Equal tensors in one place of memory share their bytes in a pickle; safetensors cannot."""
    written: dict[tuple, Tensor] = {}
    ready = {}
    for key, value in state.items():
        place = value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
        if place not in written:
            # A view drags its whole storage into a pickle.
            alone = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
            copy = value if alone else value.clone(memory_format=torch.contiguous_format)
            written[place] = copy.to(dtype) if dtype is not None and value.is_floating_point() else copy
        elif safetensors:
            ready[key] = written[place].clone()
            continue
        ready[key] = written[place]
    if safetensors:
        save_file(ready, path, metadata={"format": "pt"})
    else:
        torch.save(ready, path)
