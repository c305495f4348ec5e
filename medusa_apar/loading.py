"""`medusa_apar.load(name)`: model, tokenizer, tuned weights and heads from one name, attached and ready to generate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_apar.job import on_a_terminal, write_text
from medusa_apar.models import head_files, hub
from medusa_apar.models.sources import (
    RELEASED_TOKENS,
    Source,
    adapter_weights,
    config_of,
    has_heads,
    locate,
    read_model,
    read_tokenizer,
    with_apar_folder,
)
from medusa_apar.reading import expanded
from medusa_apar.threads.control_tokens import CONFIG_NAME, MODEL_ENTRY, ControlTokens

if TYPE_CHECKING:
    from medusa_apar.heads import DraftHeads

    from .generate import MedusaApar

AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    keep_packed: bool | None = None,
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
    keep_packed: whether the weights as compiled code reads them are kept in the cache folder ($MEDUSA_APAR_CACHE) and
        mapped from there by the next start. None does so where `quantize` is asked for and the model has 268 million
        parameters or more; True needs `quantize` or `runtime="cpu"`. Packs unused the longest go when all exceed 17 GB.
    attach_options: passed to `medusa_apar.attach`: `fork` (where answers split), `speculation` (how tokens are guessed
        ahead), `max_threads` (that run in one step), `quantize="int8"`, and others that are told there.
    """
    from medusa_apar.heads import load_heads
    from medusa_apar.models.merge import merge_into
    from medusa_apar.runtimes.cpu import pack_files

    from .attaching import attach

    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    if keep_packed and attach_options.get("quantize") is None and attach_options.get("runtime") != "cpu":
        raise ValueError("keep_packed=True needs the CPU runtime: give quantize='int8' or runtime='cpu'")
    _check_devices(device_map)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _dtype(dtype, device if device_map is None else _fastest(device_map))
    source = locate(name, revision, token)
    if isinstance(apar, (str, Path)) and apar != "auto":
        source = with_apar_folder(source, apar)
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
    control = control_tokens(apar, source, tokenizer, name)
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
    keep = pack_files.worth_keeping(model, attach_options.get("quantize")) if keep_packed is None else keep_packed
    with pack_files.loading(model, keep):
        attached = attach(model, heads=heads, apar=control, tokenizer=tokenizer, attention=attention, **attach_options)
    if on_a_terminal():
        print(f"{name}: {attached!r}", file=sys.stderr)
    return attached


def save(apar: MedusaApar, folder: str | Path) -> None:
    """What `MedusaApar.save_pretrained` does. FileExistsError where `folder` holds files that are no model's."""
    from medusa_apar.models.model_folder import check_empty, new_model_folder

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
            heads = built / head_files.SUBFOLDER
            apar.heads.save_pretrained(heads, apar.heads.dtype)
            config = head_files.read_config(heads) | {"base_model_name_or_path": ".."}
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


def heads_name(heads: str | Path, source: Source) -> str | Path:
    """Where heads of that name lie: a path, a folder in that of the model's own heads or beside it, or a Hub id."""
    if not str(heads).strip():
        raise ValueError("heads is empty: name a folder or a Hub id")
    path = expanded(heads)
    if path.exists():
        return path
    if source.heads is not None and len(path.parts) == 1:
        own = source.heads.parent if source.heads.name in head_files.SUBFOLDERS else source.heads
        if has_heads(own / path):
            return own / path
    if str(heads).startswith((".", "/", "~")) or str(heads).count("/") != 1:
        raise FileNotFoundError(f"heads={str(heads)!r} is no file, folder or Hub id")
    return str(heads)


def control_tokens(apar: Any, source: Source, tokenizer: Any, name: str | Path) -> ControlTokens | None:
    """A located model's; apar: as of `load`, which has taken a folder's name into the source."""
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
