"""An APAR adapter merged into its base: a plain transformers model that needs no peft."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from medusa_apar.job import write_text
from medusa_apar.json_files import json_object
from medusa_apar.reading import expanded, reading
from medusa_apar.threads.control_tokens import CONFIG_NAME

from . import head_files, hub
from .fingerprint import files_at, name_of
from .model_folder import check_empty, new_model_folder
from .sources import Source, adapter_weights, is_gguf, locate, read_model, read_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


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
    out = expanded(out)
    source = locate(adapter)
    if source.adapter is None:
        raise ValueError(f"{adapter} holds no adapter_config.json, so there is nothing to merge")
    base = expanded(source.base)
    for used in (source.adapter, base):
        if out.is_dir() and used.exists() and out.resolve() == used.resolve():
            raise ValueError(f"{out} is what the merged model is made from: choose another folder")
    check_empty(out, force)
    adapter_weights(source.adapter)
    model, tokenizer = merged_model(source, dtype, trust_remote_code)
    with new_model_folder(out) as built:
        _save(source, model, tokenizer, built)
        if source.heads:
            _copy_heads(source.heads, built / head_files.SUBFOLDER)
    return out


def plain_folder(source: Source, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Path | None:
    """A located model as a folder that plain transformers and vLLM read, without its heads.

    The first call merges its adapter, or unpacks its GGUF file, into the cache folder, where later ones find it by what
    it was made from. None where it needs neither: its base is what they read.

    dtype: of the weights; None keeps the base's.
    """
    if source.adapter is None and not is_gguf(source.base):
        return None
    name = f"merged-{name_of(_made_from(source))}-{'own' if dtype is None else str(dtype).removeprefix('torch.')}"

    def build(_: Path, folder: Path) -> None:
        _save(source, *merged_model(source, dtype, trust_remote_code), folder)

    return hub.build_once(hub.cache_dir() / "models" / name, build)


def _save(source: Source, model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.control and (source.control / CONFIG_NAME).is_file():
        config = json_object(source.control / CONFIG_NAME)
        config["merged_from"] = config.pop("base", source.base)  # the folder is its own base now
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _made_from(source: Source) -> list[str]:
    """What a merged model is made from, without reading the base's weights: these are told by when they were written,
    or on the Hub by their commit."""
    base, parts = expanded(source.base), [source.base]
    if source.base in hub.EMBEDDED:
        parts.append(hub.embedded_model_path(source.base).name)
    elif base.exists():
        parts += files_at(base)
    else:
        found = try_to_load_from_cache(source.base, "config.json", revision=source.revision)
        parts.append(Path(found).parent.name if isinstance(found, str) else str(source.revision))
    if source.adapter:
        parts.append(hub.sha256_of(adapter_weights(source.adapter)))
    for folder, file in ((source.adapter, "adapter_config.json"), (source.control, CONFIG_NAME)):
        if folder and (folder / file).is_file():
            parts.append(hub.sha256_of(folder / file))
    return parts


def merged_model(source: Source, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a located model, its adapter's deltas added in float32.

    dtype: of the returned weights; None is the one the base is stored in.
    """
    base = str(hub.embedded_model_dir(source.base)) if source.base in hub.EMBEDDED else source.base
    tokenizer = read_tokenizer(source.tokenizer or base, trust_remote_code=trust_remote_code)
    if dtype is None and not is_gguf(base):
        dtype = read_config(base, trust_remote_code).dtype
    model = read_model(base, torch.float32, trust_remote_code=trust_remote_code)
    if source.adapter:
        model = merge_into(model, source.adapter, tokenizer)
    return model.to(dtype or torch.float32).eval(), tokenizer


def read_config(base: str, trust_remote_code: bool) -> Any:
    """transformers' config of a model folder or Hub id."""
    from transformers import AutoConfig

    with reading(f"the config of {base}"):
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


def merge_into(model: Any, adapter: Path, tokenizer: Any) -> Any:
    """`model` with the adapter's deltas added in place, so that it computes what peft's unmerged model does.

    A base whose vocabulary is smaller than the tokenizer's, or than the ids the adapter trained, grows first. Where the
    adapter changes one of embedding and unembedding and the base has one matrix for both, it has two afterwards.
    ValueError where the adapter is none that can be merged, or is another model's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    config = _adapter_config(adapter)
    with reading(adapter / "adapter_config.json"):
        trained = getattr(config, "trainable_token_indices", None) or []
        ids = trained if isinstance(trained, list) else [id for ids in trained.values() for id in ids]
        rows = model.get_input_embeddings().num_embeddings
        size = max(len(tokenizer), *(id + 1 for id in ids), 0)
        if size > max(len(tokenizer), rows) + len(ids):
            raise ValueError(f"it trains the row of id {size - 1}, and the model has {rows}")
    if size > rows:  # an adapter that brings its own control tokens
        model.resize_token_embeddings(size, mean_resizing=False)
    tuned = put_adapter(model, adapter)
    _untie(tuned.get_base_model())
    with reading(adapter, "cannot be merged"), _without_deprecations():
        model = tuned.merge_and_unload()
    left = [
        name for name, module in model.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    if left:  # one wrapped around another
        raise NotImplementedError(f"{adapter} changes {left[0]} in two ways at once, which peft cannot merge")
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:  # peft unties where a whole end was trained
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def put_adapter(model: Any, adapter: Path, is_trainable: bool = False) -> PeftModel:
    """peft's model of `adapter` over `model`, every tensor of its file in its place and none missing."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    config = _adapter_config(adapter)
    with reading(adapter_weights(adapter)):
        stored = load_peft_weights(str(adapter), device="cpu")
    with reading(adapter, "does not fit its base model"), _without_deprecations():
        tuned = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=is_trainable)
        # peft alone drops what finds no place, and leaves what it lacks as if it had never been trained.
        found: Any = set_peft_model_state_dict(tuned, stored)
        biases = {key for key in get_peft_model_state_dict(tuned, save_embedding_layers=False) if key.endswith(".bias")}
    absent = set(found.missing_keys)
    state = tuned.state_dict()
    filled = {tensor.data_ptr() for key, tensor in state.items() if key not in absent}  # tied ones lie in the file once
    missing = [key for key in found.missing_keys if "default" in key.split(".") and state[key].data_ptr() not in filled]
    missing += sorted(biases - stored.keys())
    faults = (missing, "are missing from its file"), (found.unexpected_keys, "have no place in that model")
    for keys, fault in faults:
        if keys:
            raise ValueError(
                f"{adapter} does not fit its base model: {len(keys)} of its tensors {fault}, {keys[0]} for one"
            )
    return tuned


def _adapter_config(adapter: Path) -> Any:
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = adapter / "adapter_config.json"
    kind = json_object(path).get("peft_type")
    if kind not in [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]:
        raise ValueError(f"peft_type is {kind!r} in {path}, which the installed peft does not know")
    with reading(path):
        config = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{path} is of kind {kind}, which is fed with the prompt and cannot be merged into weights")
    return config


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """What peft and transformers have to settle between them; peft's other warnings are for users."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _untie(model: Any) -> None:
    """Gives the unembedding a matrix of its own where LoRA changes one end of a tied pair, or each in its own way."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [[module for module in end.modules() if isinstance(module, BaseTunerLayer)] for end in ends]
    plain = [_innermost(end) for end in ends]
    if plain[0].weight is not plain[1].weight:
        return
    if all(isinstance(layer, TrainableTokensLayer) for end in layers for layer in end):  # peft's own, the same for both
        return
    plain[1].weight = nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False


def _innermost(module: nn.Module) -> Any:
    """The layer of the base model that peft's wrappers lie around."""
    while (inner := getattr(module, "token_adapter", None) or getattr(module, "base_layer", None)) is not None:
        module = inner
    return module


def _copy_heads(heads: Path, folder: Path) -> None:
    """The heads' files into `folder`, with the model around it as their base."""
    folder.mkdir()
    names = [name for name in head_files.FILES if (heads / name).is_file()][:1]
    for name in names or [path.name for path in heads.iterdir() if path.suffix in (".safetensors", ".bin")]:
        shutil.copyfile(heads / name, folder / name)
    config = head_files.read_config(heads) | {"base_model_name_or_path": ".."}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
