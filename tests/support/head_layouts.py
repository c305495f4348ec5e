"""Files of Medusa heads in every layout there is, written by nothing of the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from medusa_apar.commands import cli

HIDDEN, VOCABULARY = 16, 37
MAP = [4, 30, 2, 11]


def make_base(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
    **save_options: Any,
) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **save_options)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def blocks_and_rows(
    num_heads: int,
    num_layers: int,
    own: bool,
    dtype: torch.dtype = torch.float32,
    rows: int = VOCABULARY,
    tied: bool = False,
) -> dict[str, torch.Tensor]:
    """A file's content by the V1 or V2 naming."""
    generator = torch.Generator().manual_seed(num_heads * 10 + num_layers)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    state = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            for kind, shape in (("weight", (HIDDEN, HIDDEN)), ("bias", (HIDDEN,))):
                first = state.get(f"{head}.0.linear.{kind}")
                state[f"{head}.{layer}.linear.{kind}"] = first if tied and layer else randn(*shape)
        if own:
            state[f"{head}.{num_layers}.weight"] = randn(rows, HIDDEN)
    return state


def in_vllm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) == 4:
            named[f"blocks.{parts[0]}.layers.{parts[1]}.{parts[3]}"] = value
        elif len(parts) == 3:
            named[f"lm_heads.{parts[0]}.weight"] = value
        else:
            named[key] = value
    return named


def unembedding(base: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").get_output_embeddings().weight.detach()


def with_whole_rows(state: dict[str, torch.Tensor], base: Path) -> dict[str, torch.Tensor]:
    """What vLLM's layout makes of heads with a token_map: rows that a head lacks are the base's."""
    whole = dict(state)
    token_map = whole.pop("token_map").long()
    for key, rows in state.items():
        if len(key.split(".")) == 3 and len(rows) == len(token_map):
            whole[key] = unembedding(base).to(rows.dtype).clone()
            whole[key][token_map] = rows
    return whole


def write(
    layout: str,
    folder: Path,
    state: dict[str, torch.Tensor],
    base: Any,
    pickled: bool = False,
    bias: bool = True,
) -> None:
    """A folder in one of the layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"base_model_name_or_path": str(base), "medusa_num_heads": 2, "vocab_size": VOCABULARY}
    if layout == "vllm":
        own = any(len(key.split(".")) == 3 for key in state)
        token_map = state.get("token_map")
        state = in_vllm_names(state)
        if not own:
            rows = unembedding(base)
            state["lm_head.weight"] = rows.clone() if token_map is None else rows[token_map.long()]
        if not bias:
            state = {key: value for key, value in state.items() if not key.endswith(".bias")}
        config |= {"model_type": "medusa", "original_lm_head": not own, "medusa_fc_bias": bias}
        name = "model.safetensors"
    elif layout == "medusa2":
        files = [*base.glob("*.safetensors")]
        weights = {key: value for file in files for key, value in load_file(file).items()}
        state = weights | {f"medusa_head.{key}": value for key, value in state.items()}
        config |= json.loads((base / "config.json").read_text())
        name = "model.safetensors"
    else:
        folder = folder / "medusa" if layout == "apar" else folder
        folder.mkdir(exist_ok=True)
        name = "medusa_lm_head.pt" if pickled or layout == "apar" else "medusa_lm_head.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".pt"):
        torch.save(state, folder / name)
    else:
        save_file({key: value.clone() for key, value in state.items()}, folder / name, metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor under `folder` as (dtype, shape, bytes)."""
    state = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            state |= load_file(file)
        elif file.suffix == ".pt":
            state |= torch.load(file, weights_only=True)
    return {
        key: (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
        for key, value in state.items()
    }


def refused(capsys: Any, *args: Any) -> str:
    """The one sentence of a refused `convert`."""
    assert cli.main(["convert", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("medusa-apar: ")
    return err
