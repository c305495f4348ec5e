"""`medusa_apar.load(name)`: model, tokenizer, tuned weights and heads from one name, attached and ready to generate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_apar.threads.control_tokens import CONFIG_NAME, MODEL_ENTRY, ControlTokens

from .job import on_a_terminal, write_text
from .json_files import json_object
from .models import hub
from .reading import expanded, field, reading, shards

if TYPE_CHECKING:
    from .generate import MedusaApar
    from .heads import DraftHeads

RELEASED_TOKENS = ("[SplitMask]", "[SplitSop]")  # [Fork] and [Child] of the APAR models their authors released
AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
HUB_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*", "medusa_lm_head.*", "medusa/*"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the parts of a model lie, settled before any of its weights is read."""

    base: str  # embedded name, folder, GGUF file or Hub id
    tokenizer: str | None = None  # folder or Hub id; None: the base's own
    adapter: Path | None = None  # folder of a peft adapter
    heads: Path | None = None  # folder of Medusa heads
    control: Path | None = None  # folder whose configs give the control tokens
    revision: str | None = None  # of a base on the Hub


def load(
    name: str | Path = "smollm2-135m",
    *,
    heads: str | Path | DraftHeads | None = "auto",
    apar: str | Path | ControlTokens | bool | None = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **attach_options: Any,
) -> MedusaApar:
    """A model ready to generate with parallel threads and speculative heads.

    name: `"smollm2-135m"` (the embedded default, downloaded once, 93 MB, and kept in the cache folder, 542 MB), a
        folder (a transformers model, a peft adapter, or Medusa heads, the latter two naming their base in their
        config), a GGUF file or a Hub id.
    heads: draft heads; `"auto"` takes those that come with the model, if any, None drafts without. A folder, a Hub id,
        or the name of a folder among what comes with the model: `"medusa"` beside smollm2-135m's Hydra heads.
    apar: forking; `"auto"` uses the tuned weights and control tokens that come with the model, if any. True insists on
        them. None leaves both out: the base model as it was released. A folder gives an adapter or an
        `apar_config.json` of your own; `ControlTokens` the ids alone.
    dtype: None is float32 where the whole model lies on a CPU, where "the same tokens as transformers" then holds to
        the bit of an argmax, and bfloat16 on CUDA, where kernels of other shapes round differently anyway. "auto" is
        the one that the weights are stored in.
    device: None is CUDA where there is one.
    device_map: as transformers takes it, in place of `device`, for a model of which a part stays in main memory or on
        disk. NotImplementedError for one that lies on several GPUs, which of "auto" and its like is known only once
        transformers has spread the model.
    revision: branch, tag or commit of the Hub repository `name`.
    token: of a Hub account, for what is not public; None is the one of `hf auth login`.
    trust_remote_code: whether code from the model's repository may run; never on by itself.
    attach_options: passed to `medusa_apar.attach`: `fork` (where answers split), `speculation` (how tokens are guessed
        ahead), `max_threads` (that run in one step), `quantize="int8"`, and others that are told there.
    """
    from medusa_apar.models.merge import merge_into

    from .generate import attach
    from .heads import load_heads

    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    _check_devices(device_map)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _dtype(dtype, device if device_map is None else _fastest(device_map))
    source = locate(name, revision, token)
    if isinstance(apar, (str, Path)) and apar != "auto":
        source = _with_apar_folder(source, apar)
    elif apar is None or apar is False:
        source = replace(source, adapter=None, control=None)
    if isinstance(heads, (str, Path)):
        heads = source.heads if heads == "auto" else heads_name(heads, source)
    if source.adapter:
        adapter_weights(source.adapter)

    base = str(hub.embedded_model_dir(source.base)) if source.base in hub.EMBEDDED else source.base
    access = {"revision": source.revision, "token": token, "trust_remote_code": trust_remote_code}
    tokenizer = read_tokenizer(source.tokenizer or base, **access)
    tokenizer.padding_side = "left"  # answers go on at the right end; many tokenizers are saved as training had them
    control = _control_tokens(apar, source, tokenizer, name)
    model = read_model(base, chosen, device_map=device_map, **access)
    placed = getattr(model, "hf_device_map", None)
    _check_devices(placed)
    if source.base in hub.EMBEDDED:
        model.name_or_path = source.base  # what is saved names its base, not a path of this machine
    if source.adapter:
        if placed and len(set(placed.values())) > 1:
            raise NotImplementedError(
                "an adapter cannot be merged into weights that are spread over devices: run `medusa-apar merge` and "
                "load what it writes"
            )
        model = merge_into(model, source.adapter, tokenizer)
    model = (model.to(device) if device_map is None else model).eval()
    if isinstance(heads, (str, Path)):
        heads = load_heads(heads, model, token=token)
    if control is not None:  # so that what `model.save_pretrained` writes forks too
        setattr(model.config, MODEL_ENTRY, control.as_config())
    elif hasattr(model.config, MODEL_ENTRY):
        delattr(model.config, MODEL_ENTRY)
    attached = attach(model, heads=heads, apar=control, tokenizer=tokenizer, attention=attention, **attach_options)
    if on_a_terminal():
        print(f"{name}: {attached!r}", file=sys.stderr)
    return attached


def save(apar: MedusaApar, folder: str | Path) -> None:
    """What `MedusaApar.save_pretrained` does. FileExistsError where `folder` holds files that are no model's."""
    from medusa_apar.models.model_folder import check_empty, new_model_folder

    from .heads import checkpoints

    folder = expanded(folder)
    check_empty(folder, force=True)
    with new_model_folder(folder) as built:
        apar.model.save_pretrained(built)
        if apar.tokenizer is not None:
            apar.tokenizer.save_pretrained(built)
        if apar.control_token_ids is not None:
            text = json.dumps(apar.control_token_ids.as_config(), indent=2)
            write_text(built / CONFIG_NAME, f"{text}\n")
        elif MODEL_ENTRY in (config := config_of(built)):  # of a model that forked before `attach` was told otherwise
            del config[MODEL_ENTRY]
            write_text(built / "config.json", json.dumps(config, indent=2) + "\n")
        if apar.heads is not None:
            heads = built / checkpoints.SUBFOLDER
            apar.heads.save_pretrained(heads, apar.heads.dtype)
            config = checkpoints.read_config(heads) | {"base_model_name_or_path": ".."}
            write_text(heads / "config.json", json.dumps(config, indent=2) + "\n")


def _fastest(device_map: Any) -> torch.device:
    """The GPU that a part of the model lies on, else the CPU."""
    if isinstance(device_map, str) and device_map in AUTOMATIC_MAPS:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chips = _chips(device_map.values() if isinstance(device_map, dict) else [device_map])
    return next(iter(chips), torch.device("cpu"))


def _chips(places: Iterable[Any]) -> set[torch.device]:
    """The GPUs among a device map's places, each under one name: 0, "cuda" and "cuda:0" are the same."""
    chips = set()
    for place in places:
        if place == "disk":
            continue
        try:
            device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device_map names {place!r}, which is no device of torch's") from error
        if device.type not in ("cpu", "meta"):
            chips.add(torch.device(device.type, device.index or 0))
    return chips


def _check_devices(device_map: str | dict[str, Any] | None) -> None:
    chips = _chips(device_map.values()) if isinstance(device_map, dict) else ()
    if len(chips) > 1:
        raise NotImplementedError(
            f"device_map spreads the model over {len(chips)} GPUs, and a step runs on one: take one GPU "
            '(device_map={"": 0}), or serve the model with vLLM, which runs across GPUs'
        )


def locate(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Source:
    """The parts `name` stands for; downloads configs and heads of a Hub repository, but no base weights."""
    return _located(name, revision, token, ())


def _located(name: str | Path, revision: str | None, token: str | bool | None, building: tuple[Path, ...]) -> Source:
    """`building`: the folders that name this one as their base."""
    from .heads import checkpoints

    if not str(name):
        raise ValueError("the model's name is empty")
    path = expanded(name)
    here = name in hub.EMBEDDED or path.exists()
    if revision is not None and here:
        raise ValueError(f"revision={revision!r} is of a Hub repository, which {name} is not")
    if name in hub.EMBEDDED:
        return replace(_parts(Path(str(files("medusa_apar.heads"))) / "weights" / str(name)), base=str(name))
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
        if _file_names(folder, asked, revision, token) & set(checkpoints.FULL_MODEL_FILES):
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


def _parts(folder: Path) -> Source:
    """What `folder` holds besides base weights, and which base its configs name ("" for none)."""
    adapter = folder if (folder / "adapter_config.json").exists() else None
    heads = next((place for place in (folder, folder / "medusa") if _has_heads(place)), None)
    control = folder if (folder / CONFIG_NAME).exists() or MODEL_ENTRY in config_of(folder) else None
    named = [(control, CONFIG_NAME, "base"), (adapter, "adapter_config.json", "base_model_name_or_path")]
    named.append((heads and folder, "config.json", "base_model_name_or_path"))
    bases = [field(config_of(place, file), key, str, place / file) for place, file, key in named if place]
    return Source(base=next(filter(None, bases), ""), adapter=adapter, heads=heads, control=control)


def _has_heads(folder: Path) -> bool:
    from .heads import checkpoints

    if any((folder / file).is_file() for file in checkpoints.FILES):
        return True
    if folder.name == "medusa":
        return any((folder / file).is_file() for file in checkpoints.FULL_MODEL_FILES)
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


def _with_apar_folder(source: Source, name: str | Path) -> Source:
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


def heads_name(heads: str | Path, source: Source) -> str | Path:
    """Where heads of that name lie: a path, a folder beside the model's own heads, or a Hub id."""
    if not str(heads).strip():
        raise ValueError("heads is empty: name a folder or a Hub id")
    path = expanded(heads)
    if path.exists():
        return path
    if source.heads is not None and len(path.parts) == 1 and _has_heads(source.heads / path):
        return source.heads / path
    if str(heads).startswith((".", "/", "~")) or str(heads).count("/") != 1:
        raise FileNotFoundError(f"heads={str(heads)!r} is no file, folder or Hub id")
    return str(heads)


def _control_tokens(apar: Any, source: Source, tokenizer: Any, name: str | Path) -> ControlTokens | None:
    if apar is None or apar is False:
        return None
    if isinstance(apar, ControlTokens):
        return apar
    if source.control:
        return ControlTokens.from_pretrained(source.control)
    ids = [tokenizer.get_vocab().get(token) for token in RELEASED_TOKENS]
    if None not in ids:
        return ControlTokens(*ids)
    if apar == "auto":
        return None
    raise ValueError(
        f"{name} has no control tokens: no {CONFIG_NAME} beside it and no {' and '.join(RELEASED_TOKENS)} in its "
        "vocabulary; pass apar=ControlTokens(fork_id, child_id)"
    )


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, must be float32, bfloat16, float16, float64 or auto")
    return found


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
