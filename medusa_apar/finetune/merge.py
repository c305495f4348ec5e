"""An APAR adapter merged into its base: a plain transformers model that needs no peft."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from medusa_apar import hub
from medusa_apar.control_tokens import CONFIG_NAME
from medusa_apar.heads import checkpoints
from medusa_apar.heads.model_folder import check_empty, new_model_folder
from medusa_apar.job import write_text

if TYPE_CHECKING:
    from medusa_apar.loading import Source


def merge(
    adapter: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """`adapter` (a folder, a Hub id or an embedded name) merged into its base, as a model folder `out`.

    Written are weights, tokenizer with chat template, generation config, `apar_config.json`, and the adapter's heads
    in `medusa/`. The deltas are added in float32.

    dtype: of the weights; None keeps the base's.
    force: replace a model that lies in `out`; other files stay. FileExistsError where `out` is not empty and holds no
        model, or without `force`; ValueError where `adapter` is no adapter, or `out` is the adapter or its base.
        Nothing is written in these cases.
    trust_remote_code: whether code from the base's repository may run.
    """
    from medusa_apar import loading

    out = Path(out).expanduser()
    source = loading.locate(adapter)
    if source.adapter is None:
        raise ValueError(f"{adapter} holds no adapter_config.json, so there is nothing to merge")
    base = Path(source.base).expanduser()
    for used in (source.adapter, base):
        if out.is_dir() and used.exists() and out.resolve() == used.resolve():
            raise ValueError(f"{out} is what the merged model is made from: choose another --out")
    check_empty(out, force)
    model, tokenizer = merged_model(source, dtype, trust_remote_code)
    with new_model_folder(out) as built:
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        if source.control:
            config = json.loads((source.control / CONFIG_NAME).read_text(encoding="utf-8"))
            config["merged_from"] = config.pop("base", source.base)  # the folder is its own base now
            write_text(built / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        if source.heads:
            _copy_heads(source.heads, built / checkpoints.SUBFOLDER)
    return out


def merged_model(source: Source, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a located model, its adapter's deltas added in float32.

    dtype: of the returned weights; None is the one the base is stored in.
    """
    from transformers import AutoConfig

    from medusa_apar import loading

    base = str(hub.embedded_model_dir(source.base)) if source.base in hub.EMBEDDED else source.base
    tokenizer = loading._tokenizer(source.tokenizer or base, trust_remote_code)
    if dtype is None and not base.endswith(".gguf"):
        dtype = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype
    model = loading._model(base, torch.float32, trust_remote_code)
    if source.adapter:
        model = merge_into(model, source.adapter, tokenizer)
    return model.to(dtype or torch.float32).eval(), tokenizer


def merge_into(model: Any, adapter: Path, tokenizer: Any) -> Any:
    """`model` with the adapter's deltas added in place.

    A base whose vocabulary is smaller than the tokenizer's, or than the ids the adapter trained, grows first.
    """
    from peft import PeftConfig, PeftModel

    trained = getattr(PeftConfig.from_pretrained(str(adapter)), "trainable_token_indices", None) or []
    ids = trained if isinstance(trained, list) else [id for ids in trained.values() for id in ids]
    size = max(len(tokenizer), *(id + 1 for id in ids), 0)
    if size > model.get_input_embeddings().num_embeddings:  # an adapter that brings its own control tokens
        model.resize_token_embeddings(size, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between peft and transformers, nothing a user can act on
        try:
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except SafetensorError as error:
            raise ValueError(f"{adapter}/adapter_model.safetensors is damaged ({error})") from error


def _copy_heads(heads: Path, folder: Path) -> None:
    """The heads' files into `folder`, with the model around it as their base."""
    folder.mkdir()
    names = [name for name in checkpoints.FILES if (heads / name).is_file()][:1]
    for name in names or [path.name for path in heads.iterdir() if path.suffix in (".safetensors", ".bin")]:
        shutil.copyfile(heads / name, folder / name)
    config = checkpoints.read_config(heads) | {"base_model_name_or_path": ".."}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
