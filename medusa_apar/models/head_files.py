"""The files in which draft heads lie: their names, and the config beside them, checked field by field."""

from __future__ import annotations

from pathlib import Path

from medusa_apar.json_files import json_object
from medusa_apar.reading import field

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
FULL_MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
CONFIG_FIELDS = {
    **dict.fromkeys(("kind", "base_model_name_or_path", "model_type"), str),
    **dict.fromkeys(("vocab_size", "hidden_size", "medusa_num_heads", "medusa_num_layers"), int),
    **dict.fromkeys(("original_lm_head", "medusa_fc_bias"), bool),
    "acceptance": list,
}
SUBFOLDER = "medusa"  # where APAR models keep their heads
SUBFOLDERS = ("eagle3", SUBFOLDER)  # where heads lie beside a model or an adapter; the first is what "auto" takes


def read_config(folder: Path) -> dict:
    """`config.json` of a folder, {} where there is none."""
    path = folder / "config.json"
    config = json_object(path) if path.exists() else {}
    for name, kind in CONFIG_FIELDS.items():
        field(config, name, kind, path)
    for ranks in config.get("acceptance") or []:
        if not isinstance(ranks, list) or not ranks or not all(_is_share(share) for share in ranks):
            raise ValueError(f"acceptance is {ranks!r} for a head in {path}, must be a list of numbers from 0 to 1")
    return config


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def holds_model(folder: Path) -> bool:
    """Whether the folder's config.json is a model's, and not that of heads in vLLM's layout or of a drafter."""
    config = read_config(folder)
    drafter = "speculators_model_type" in config or any(
        "Eagle3" in str(name) for name in config.get("architectures") or []
    )
    return not drafter and config.get("model_type", "medusa") != "medusa"
