"""Medusa heads from one file layout into another, bit for bit; an EAGLE-3 drafter goes to `eagle3/convert.py`.

Layouts are those of `checkpoints.py`; what `vllm_layout.py` says of its own holds here. Tensors are renamed, never
recomputed: what a target cannot express is refused with a sentence. Three things come and go on the way:

- The base's unembedding. V2 heads use the base's own; vLLM's layout holds one copy of it, V1 and APAR one per head.
  It is read from the base where a target needs it, marked in the config (`original_lm_head`), and dropped on the way
  back.
- Biases of zero. vLLM's blocks may have none, all other layouts must; the config remembers (`medusa_fc_bias`).
- A truncated draft vocabulary, which is whole in vLLM's layout and stays so on the way back.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from medusa_apar.job import write_text
from medusa_apar.models import head_files
from medusa_apar.models.base_model import Base, model_shards
from medusa_apar.models.model_folder import check_empty, new_model_folder
from medusa_apar.reading import expanded, reading

from . import checkpoints, vllm_layout
from .eagle3 import convert as eagle3
from .eagle3.writing import LAYOUTS as DRAFTER_LAYOUTS
from .eagle3.writing import Layout as DrafterLayout
from .layouts import LAYOUTS, Heads, Summary, bias_of, check_free, draft_rows, own_base, read, summary, write_alone

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("safetensors", "pt")
MODEL_TEXT = (".json", ".jinja", ".model", ".txt", ".py")  # what a model folder holds besides its weights


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
) -> tuple[Summary | eagle3.Summary, Summary | eagle3.Summary, list[str]]:
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
    if to in DRAFTER_LAYOUTS:
        if file_format == "pt":
            raise ValueError(f"the {to} layout is written as safetensors alone")
        shared: dict[str, Any] = {"base": base, "dtype": dtype, "force": force, "trust_remote_code": trust_remote_code}
        return eagle3.convert(source, cast(DrafterLayout, to), out, **shared)
    name = _file_name(to, file_format)
    folder = out / head_files.SUBFOLDER if to == "apar" else out
    heads = read(source)
    given = Base(base, trust_remote_code) if base else None
    _check_free(folder, to, force, heads, given)
    target = _in_layout(heads, to, given, trust_remote_code)
    state, config = _state_dict(target, to, name), _config(target, to, folder)
    if to == "medusa2":
        owner = given or own_base(heads, "a medusa2 model holds its weights", trust_remote_code)
        _write_full_model(out, state, config, dtype, owner)
    else:
        write_alone(folder, state, config, dtype, name)
    return summary(heads, heads.layout, Path(source)), summary(target, to, out, state, dtype), heads.notes


# ---- what a target can hold


def _in_layout(heads: Heads, to: str, given: Base | None, trust_remote_code: bool) -> Heads:
    """The same heads with the unembeddings that layout `to` has. ValueError: it cannot hold them."""
    if to == "vllm":
        return vllm_layout.in_layout(heads, given, trust_remote_code)
    file = heads.file
    if file.token_map is not None and to in ("medusa2", "apar"):
        raise ValueError(
            f"these heads draft from {len(file.token_map)} of the vocabulary's tokens, and the {to} layout has no "
            "token_map to say which"
        )
    if file.token_map is not None:
        heads.notes.append("token_map is written along; in this layout only medusa-apar reads it.")
    if to == "apar" and not file.tied():
        raise ValueError(
            "a head's residual blocks differ, and the apar layout keeps one block for all of them: use --to v1"
        )
    if to == "v2" or (to == "medusa2" and not file.unembeddings):
        _check_against_base(heads, given, to)
        return replace(heads, file=replace(file, shared=None, unembeddings={}))
    if file.unembeddings:
        return heads
    shared = file.shared
    if shared is None:
        owner = given or own_base(heads, f"the {to} layout holds a copy of its unembedding", trust_remote_code)
        shared = draft_rows(owner.unembedding, file.token_map)
        heads.vocab_size = len(owner.unembedding)
    copies = dict.fromkeys(range(file.num_heads), shared)
    return replace(heads, file=replace(file, shared=shared, unembeddings=copies))


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
        rows = draft_rows(given.unembedding, file.token_map)
        for tensor in mine:
            cut = draft_rows(tensor, file.token_map)
            if cut.shape != rows.shape or not torch.equal(cut, rows.to(cut.dtype)):
                raise ValueError(
                    f"the heads' unembedding is not that of {given.name}, and the {to} layout would leave it out"
                )
    elif mine:
        heads.notes.append("lm_head.weight is left out: it is the base's, and the base serves.")


# ---- how a target says it


def _state_dict(heads: Heads, to: str, name: str) -> dict[str, Tensor]:
    if to == "vllm":
        return vllm_layout.state_dict(heads)
    file, state = heads.file, {}
    for head, layer in product(range(file.num_heads), range(file.num_layers)):
        if to == "apar" and name.endswith(".safetensors") and layer:
            continue  # tied to block 0; safetensors writes no tensor twice
        block = file.blocks[head, layer]
        state[f"{head}.{layer}.linear.weight"] = block["weight"]
        state[f"{head}.{layer}.linear.bias"] = bias_of(block)
    for head, unembedding in file.unembeddings.items():
        state[f"{head}.{file.num_layers}.weight"] = unembedding
    if file.token_map is not None:
        state["token_map"] = file.token_map
    return {f"medusa_head.{key}": tensor for key, tensor in state.items()} if to == "medusa2" else state


def _config(heads: Heads, to: str, folder: Path) -> dict[str, Any]:
    if to == "vllm":
        return vllm_layout.config(heads)
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
    return counts | {"hidden_size": file.hidden_size} | vocabulary | own


# ---- where it goes


def _file_name(to: str, file_format: str | None) -> str:
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r} is not one of {', '.join((*LAYOUTS, *DRAFTER_LAYOUTS))}")
    if file_format is not None and file_format not in FORMATS:
        raise ValueError(f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    if to in ("vllm", "medusa2"):
        if file_format == "pt":
            raise ValueError(f"the {to} layout is written as safetensors alone")
        return vllm_layout.FILE
    return f"medusa_lm_head.{file_format or ('pt' if to == 'apar' else 'safetensors')}"


def _check_free(folder: Path, to: str, force: bool, heads: Heads, given: Base | None) -> None:
    """FileExistsError or ValueError if writing into `folder` would destroy something."""
    if to == "vllm":
        vllm_layout.check(folder, force)
    elif to != "medusa2":
        check_free(folder, head_files.FILES, force)
    else:
        if folder.is_dir() and folder.resolve() in (heads.folder.resolve(), given and given.local):
            raise ValueError(f"{folder} is what the model is made from: choose another folder")
        check_empty(folder, force)


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
