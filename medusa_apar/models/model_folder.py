"""A model folder that is written whole or not at all, and what of an earlier one it replaces."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_apar.job import with_ordinary_permissions, writing

from . import head_files

# What is replaced of a model, and of the heads in its medusa/; other files may be anyone's.
WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MODEL_FILES = (
    *("config.json", "generation_config.json", "apar_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)


def check_empty(folder: Path, force: bool) -> None:
    """FileExistsError if a model is to be written into a folder in use without `force`, or one that is no model's."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder to write into")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise FileExistsError(
            f"{folder} is not empty: choose another folder, or force=True (--force) to replace its model"
        )
    if not head_files.holds_model(folder):
        raise FileExistsError(
            f"{folder} is not empty and holds no model (a config.json with model_type) that could be replaced: "
            "choose another folder"
        )
    for name in ("adapter_config.json", *head_files.FILES):  # a loader would take it for the new model's
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} would be read with the new model: move it away, or choose another folder"
            )


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well.

    Of a model that is there already, weights, configs, tokenizer and heads are replaced and other files stay.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch) / "model"
        built.mkdir()
        with writing(folder):
            yield built
            with_ordinary_permissions(built)
            _take_its_place(built, folder)


def _take_its_place(built: Path, folder: Path) -> None:
    if not folder.is_dir():
        os.replace(built, folder)
        return
    _remove(folder, MODEL_FILES)
    heads = folder / head_files.SUBFOLDER
    if heads.is_dir():
        _remove(heads, (*head_files.FILES, "config.json"))
        if not any(heads.iterdir()):
            heads.rmdir()
    # The config last: without it the folder is no model yet.
    files = [new for new in built.rglob("*") if new.is_file()]
    for new in sorted(files, key=lambda new: new == built / "config.json"):
        place = folder / new.relative_to(built)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, place)


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    """Weights and the named files of a folder."""
    for old in list(folder.iterdir()):
        if old.is_file() and (old.name in names or WEIGHTS.fullmatch(old.name)):
            old.unlink()
