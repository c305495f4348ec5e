"""The model that heads sit on, read only as far as a conversion needs it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from medusa_apar.reading import expanded, reading, shards

from . import head_files, hub
from .merge import merged_model
from .sources import Source, is_gguf, locate, read_model


class Base:
    """The model the heads sit on, read only as far as it is needed."""

    def __init__(self, name: str, trust_remote_code: bool = False) -> None:
        self.name, self.trust_remote_code = name, trust_remote_code
        path = expanded(name)
        self.local = path.resolve() if name not in hub.EMBEDDED and path.is_dir() else None

    @cached_property
    def source(self) -> Source:
        return locate(self.name)

    @cached_property
    def unembedding(self) -> Tensor:
        """[vocabulary, H] in the dtype it is stored in, with what an adapter tuned."""
        if self.source.adapter or is_gguf(self.source.base):
            model, _ = merged_model(self.source, trust_remote_code=self.trust_remote_code)
            weight, bias = _output(model, self.name)
        else:
            weight, bias = _stored_unembedding(self.folder(), self.name, self.trust_remote_code)
        if bias is not None:
            raise ValueError(f"the unembedding of {self.name} has a bias, for which head files have no place")
        return weight.detach()

    def folder(self) -> Path:
        """The folder of the model's weights, downloaded where they are on the Hub."""
        if self.source.base in hub.EMBEDDED:
            return hub.embedded_model_dir(self.source.base)
        path = expanded(self.source.base)
        if path.is_dir():
            return path
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.source.base, ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "*.gguf"]))

    def whole_model(self) -> Path:
        """The folder of a base that is a model and not an adapter on one."""
        if self.source.adapter:
            raise ValueError(
                f"{self.name} is an adapter on {self.source.base}: run `medusa-apar merge` and pass the merged model "
                "as --base"
            )
        if is_gguf(self.source.base):
            raise ValueError(f"{self.name} is a GGUF file: pass a model folder as --base")
        return self.folder()


def model_shards(folder: Path) -> list[Path]:
    """The weight files of a transformers model folder. FileNotFoundError: it has none."""
    for name in head_files.FULL_MODEL_FILES:
        file = folder / name
        if file.is_file() and name.endswith(".index.json"):
            return sorted(set(shards(file).values()))
        if file.is_file():
            return [file]
    raise FileNotFoundError(f"no model weights in {folder}: none of {', '.join(head_files.FULL_MODEL_FILES)} is there")


def _stored_unembedding(folder: Path, name: str, trust_remote_code: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the unembedding: the one tensor where its name is plain, else the whole model is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with reading(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    weight, bias = _output(empty, name)
    names = [key for key, parameter in empty.named_parameters(remove_duplicate=False) if parameter is weight]
    if bias is None and getattr(config, "quantization_config", None) is None:
        for shard in model_shards(folder):
            if shard.suffix == ".safetensors":
                with reading(shard), safe_open(shard, framework="pt") as file:
                    for key in names:
                        if key in file.keys():  # noqa: SIM118
                            return file.get_tensor(key), None
    return _output(read_model(str(folder), "auto", trust_remote_code=trust_remote_code), name)


def _output(model: Any, name: str) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"{name} has no unembedding in floating point, so none can be copied")
    bias = getattr(head, "bias", None)
    return weight, bias if isinstance(bias, Tensor) else None
