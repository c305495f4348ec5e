"""Files that are written whole or not at all, by whatever library, and can be read by whom the umask lets."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from medusa_apar import load
from medusa_apar.heads import MedusaHeads
from medusa_apar.heads.convert import convert
from medusa_apar.job import filling, replacing, with_ordinary_permissions, write_text
from medusa_apar.models.merge import merge
from tests.support.disks import full_disk
from tests.support.folders import lora_of, word_folder, word_model

TENSORS = {"a": torch.zeros(30_000)}


def replace(path, write):
    with replacing(path) as temporary:
        write(temporary)


def fill(folder):
    with filling(folder) as temporary:
        (temporary / "small").write_text("1")
        save_file(TENSORS, temporary / "large")


WRITERS = {
    "safetensors": lambda path, root: replace(path, lambda temporary: save_file(TENSORS, temporary)),
    "torch": lambda path, root: replace(path, lambda temporary: torch.save(TENSORS, temporary)),
    "an open file": lambda path, root: replace(path, lambda temporary: torch.save(TENSORS, temporary.open("wb"))),
    "text": lambda path, root: write_text(path, "x" * 100_000),
    "a folder": lambda path, root: fill(path),
    "a merged model": lambda path, root: merge(root / "adapter", path),
    "a saved model": lambda path, root: load(root / "base").save_pretrained(path),
    "heads": lambda path, root: heads().save_pretrained(path),
    "converted heads": lambda path, root: convert(root / "heads", "v1", path, base=str(root / "base")),
    "a whole model with heads": lambda path, root: convert(root / "heads", "medusa2", path, base=str(root / "base")),
}


def heads():
    return MedusaHeads.random(word_model(), num_heads=32)


@pytest.fixture
def root(tmp_path):
    word_folder(tmp_path / "base")
    lora_of(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    MedusaHeads.random(model, num_heads=8).save_pretrained(tmp_path / "heads", dtype=torch.float32)
    return tmp_path


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(root, kind):
    before = sorted(root.rglob("*"))
    with full_disk(), pytest.raises(OSError, match="out") as error:
        WRITERS[kind](root / "out", root)
    assert "\n" not in str(error.value)
    left = [path for path in sorted(root.rglob("*")) if path not in before]
    assert [path for path in left if path != root / "out" or any(path.iterdir())] == []
    WRITERS[kind](root / "out", root)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_ordinary_permissions(root, kind, umask):
    before = os.umask(umask)
    try:
        WRITERS[kind](root / "out", root)
    finally:
        os.umask(before)
    written = [root / "out", *(root / "out").rglob("*")]
    assert [
        oct(path.stat().st_mode) for path in written if stat.S_IMODE(path.stat().st_mode) != mode(path, umask)
    ] == []


def test_a_program_stays_one(tmp_path):
    """A peer's server is compiled into a folder of the cache, and run from there."""
    program = tmp_path / "folder" / "program"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with_ordinary_permissions(program.parent)
    assert os.access(program, os.X_OK) and stat.S_IMODE(program.stat().st_mode) & 0o011


def mode(path, umask):
    return (0o777 if path.is_dir() else 0o666) & ~umask


def test_an_error_of_the_writers_own_stays_what_it_is(tmp_path):
    (tmp_path / "kept").write_text("before")
    for error in (RuntimeError("of a kernel"), ValueError("of a user"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(tmp_path / "kept") as temporary:
            temporary.write_text("half")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "before"
