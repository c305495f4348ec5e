"""What a model's name stands for (an embedded model, a folder, a GGUF file, a Hub id), and reading what lies there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from medusa_apar.json_files import json_object
from medusa_apar.reading import expanded, field, reading, shards
from medusa_apar.threads.control_tokens import CONFIG_NAME, MODEL_ENTRY

from . import head_files, hub

RELEASED_TOKENS = ("[SplitMask]", "[SplitSop]")  # [Fork] and [Child] of the APAR models their authors released
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*", "medusa_lm_head.*"]
HUB_SMALL_FILES += [f"{subfolder}/*" for subfolder in head_files.SUBFOLDERS]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the parts of a model lie, settled before any of its weights is read."""

    base: str  # embedded name, folder, GGUF file or Hub id
    tokenizer: str | None = None  # folder or Hub id; None: the base's own
    adapter: Path | None = None  # folder of a peft adapter
    heads: Path | None = None  # folder of draft heads
    control: Path | None = None  # folder whose configs give the control tokens
    revision: str | None = None  # of a base on the Hub


def locate(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Source:
    """The parts `name` stands for; downloads configs and heads of a Hub repository, but no base weights."""
    return _located(name, revision, token, ())


def _located(name: str | Path, revision: str | None, token: str | bool | None, building: tuple[Path, ...]) -> Source:
    """`building`: the folders that name this one as their base."""
    if not str(name):
        raise ValueError("the model's name is empty")
    path = expanded(name)
    here = name in hub.EMBEDDED or path.exists()
    if revision is not None and here:
        raise ValueError(f"revision={revision!r} is of a Hub repository, which {name} is not")
    if name in hub.EMBEDDED:
        return replace(_parts(shipped_weights(str(name))), base=str(name))
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is a file, but no GGUF file: name the folder it lies in")
    if path.is_file():
        return Source(base=str(path))
    if not path.is_dir():
        folder, hub_id = _hub_folder(str(name), revision, token), str(name)
    else:
        folder, hub_id = path, str(path)
    parts = _parts(folder)
    if parts.adapter:
        asked = hub_id if not path.is_dir() and config_of(folder).get("model_type") else None
        if _file_names(folder, asked, revision, token) & set(head_files.FULL_MODEL_FILES):
            words = "holds a model's weights and an adapter too (adapter_config.json)"
            raise ValueError(f"{name} {words}: move the one that is not meant")
    # A whole model, perhaps with heads beside it; some tools write the base's config into an adapter's folder.
    if config_of(folder).get("model_type") and not parts.adapter:
        return replace(parts, base=hub_id, revision=revision)
    if not parts.base:
        raise ValueError(f"{name} holds no model, and no adapter or heads whose config names a base model")
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    building = (*building, folder.resolve())
    return replace(parts, base=_base_name(parts.base, folder, token, building), tokenizer=tokenizer)


def shipped_weights(name: str) -> Path:
    """The folder of the adapter and the heads that this package ships for an embedded model."""
    heads = find_spec("medusa_apar.heads")  # found, not imported: the heads are a room above this one
    assert heads and heads.submodule_search_locations
    return Path(heads.submodule_search_locations[0]) / "weights" / name


def _parts(folder: Path) -> Source:
    """What `folder` holds besides base weights, and which base its configs name ("" for none)."""
    adapter = folder if (folder / "adapter_config.json").exists() else None
    places = (folder, *(folder / subfolder for subfolder in head_files.SUBFOLDERS))
    heads = next((place for place in places if has_heads(place)), None)
    control = folder if (folder / CONFIG_NAME).exists() or MODEL_ENTRY in config_of(folder) else None
    named = [(control, CONFIG_NAME, "base"), (adapter, "adapter_config.json", "base_model_name_or_path")]
    named.append((heads and folder, "config.json", "base_model_name_or_path"))
    bases = [field(config_of(place, file), key, str, place / file) for place, file, key in named if place]
    return Source(base=next(filter(None, bases), ""), adapter=adapter, heads=heads, control=control)


def has_heads(folder: Path) -> bool:
    """Whether a folder holds draft heads: files of their own, or a Medusa-2 model with heads among its weights."""
    if any((folder / file).is_file() for file in head_files.FILES):
        return True
    if folder.name in head_files.SUBFOLDERS:
        return any((folder / file).is_file() for file in head_files.FULL_MODEL_FILES)
    return "medusa_num_heads" in config_of(folder) and "model_type" in config_of(folder)  # a Medusa-2 full model


def _base_name(base: str, folder: Path, token: str | bool | None, building: tuple[Path, ...]) -> str:
    """The base an adapter or heads in `folder` name, which may be a path relative to them."""
    if base in hub.EMBEDDED:
        return base
    beside = folder / base
    if beside.resolve() in building:
        raise ValueError(f"{folder} names {base} as its base model, which holds no model but builds on {folder}")
    try:
        located = _located(beside.resolve() if beside.exists() else base, None, token, building)
    except (OSError, ValueError) as error:
        raise type(error)(f"{folder} names {base} as its base model, but {error}") from error
    if located.adapter:
        raise ValueError(f"{folder} builds on {base}, which is an adapter too: merge that one into its base first")
    return located.base


def config_of(folder: Path, file: str = "config.json") -> dict[str, Any]:
    """What a JSON file of `folder` holds, {} where there is none."""
    path = folder / file
    return json_object(path) if path.exists() else {}


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter's weights. FileNotFoundError if there is none: peft would ask the Hub for it."""
    found = [folder / file for file in ADAPTER_FILES if (folder / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds adapter_config.json, but neither {' nor '.join(ADAPTER_FILES)}")
    return found[0]


def _hub_folder(name: str, revision: str | None, token: str | bool | None) -> Path:
    """The small files of a Hub repository, in the Hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    known = f"not {' or '.join(hub.EMBEDDED)}, no local folder and no GGUF file"
    if not name or name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or name.count("/") > 1:
        raise FileNotFoundError(f"{name or repr(name)} does not exist")
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=HUB_SMALL_FILES))
    except GatedRepoError as error:
        raise PermissionError(
            f"the Hub repository {name} is gated: ask for access there, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hub repository {name} has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"unknown model {name!r}: {known}, and the Hub has no such repository") from error
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"unknown model {name!r}: {known}, and the Hub cannot be reached ({reason})") from error


def _file_names(folder: Path, hub_id: str | None, revision: str | None, token: str | bool | None) -> set[str]:
    """What a folder holds, or the Hub repository of which `folder` has the small files alone.

    Where the Hub cannot be reached: what of it is in the cache.
    """
    here = {path.name for path in folder.iterdir()}
    if hub_id is None:
        return here
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(hub_id, revision=revision, token=token, timeout=10).siblings
    except Exception:  # kinds of the Hub's, of HTTP and of the system
        return here
    return here | {file.rfilename for file in found or []}


def with_apar_folder(source: Source, name: str | Path) -> Source:
    """The source with the adapter and the control ids of folder `name` in place of its own."""
    if not str(name).strip():
        raise ValueError("apar is empty: name a folder")
    folder = expanded(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"apar={str(folder)!r} is no folder")
    parts = _parts(folder)
    if not parts.adapter and not parts.control:
        raise FileNotFoundError(f"{folder} holds neither {CONFIG_NAME} nor adapter_config.json")
    # A folder of control ids alone speaks about the weights that come with the model.
    return replace(source, adapter=parts.adapter or source.adapter, control=parts.control)


def read_tokenizer(name: str, **access: Any) -> Any:
    """The tokenizer of a folder, GGUF file or Hub id; access: `revision`, `token`, `trust_remote_code`."""
    from transformers import AutoTokenizer

    path = Path(name)
    with reading(f"the tokenizer of {name}"):
        if is_gguf(name):
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(name, **access)


def read_model(base: str, dtype: torch.dtype | str, device_map: Any = None, **access: Any) -> Any:
    """The causal language model of a folder, GGUF file or Hub id, none of whose weights is missing."""
    if device_map is not None:
        access["device_map"] = device_map
    if is_gguf(base):
        return hub.read_gguf(Path(base), torch.float32 if dtype == "auto" else dtype, device_map=device_map)
    for index in Path(base).glob("*.index.json"):
        shards(index)
    _check_generation_config(Path(base))
    return hub.whole_model(base, base, dtype=dtype, **access)


def _check_generation_config(folder: Path) -> None:
    """ValueError where it is damaged: transformers would go on with other end tokens than the model's."""
    path = folder / "generation_config.json"
    config = config_of(folder, path.name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config[name] if isinstance(config.get(name), list) else [config.get(name)]
        if any(type(id) not in (int, type(None)) for id in ids):
            raise ValueError(f"{name} is {config[name]!r} in {path}, must be a token id")


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")
