"""Packed weights kept in the cache: laid out once, written piece by piece, and mapped from there by the next start.

A pack is a folder named by what is in it: what the model's weights hold, sum by sum (`weight_fingerprint.py`), which
module has which of them, how they are laid out, and the code that does it. So weights that have changed have another
name and never find it. It holds a safetensors file, each of whose tensors begins where a cache line does, and that
file's sha256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.models import hub
from medusa_apar.reading import reading

from .layers import family_of, layers_of, numbers_of
from .packed_model import PackedModel, matrices_of, packs_of, weights_of
from .weight_fingerprint import WeightFingerprint
from .weights import GROUP_INPUTS, INPUTS, PANEL, PackedMatrix, up

logger = logging.getLogger(__name__)

FILE = "packed.safetensors"
WORTH = 1 << 28  # parameters of a model: what is smaller is packed in a second or two
MOST = 1 << 34  # bytes of all packs together; those that were used least lately go
_LAYOUT = (
    "weights.py",
    "layers.py",
    "packed_model.py",
    "pack_files.py",
    "pack.h",
    "vectors.h",
)  # what decides what a pack holds
_HEADER = 1 << 20  # bytes of the file before its tensors, far more than the names of ten thousand take
_LINE = 64  # bytes of a cache line
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / GROUP_INPUTS}  # of a weight, with its share of a scale
_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
_PIECE = 1 << 28  # bytes of a mapped model that are read before they are given back


def worth_keeping(model: PreTrainedModel, quantize: str | None) -> bool:
    """Whether a start from a file spares time that is noticed: weights are rounded, and there are many."""
    return quantize is not None and sum(parameter.numel() for parameter in model.parameters()) >= WORTH


@contextmanager
def loading(model: PreTrainedModel, keep: bool) -> Iterator[None]:
    """Around the first steps of a model that was just read and that nobody else holds: what is packed meanwhile is kept
    in the cache if `keep`, and what of the model is mapped from its file leaves memory where it was only read once."""
    packs = packs_of(model)
    packs.make = lambda kind: _packed_model(model, kind, keep)
    try:
        yield
    finally:
        packs.make = None


def _packed_model(model: Any, kind: str, keep: bool) -> PackedModel:
    fingerprint = WeightFingerprint(weights_of(model))
    fingerprint.release()
    released = _released(fingerprint)
    if keep:
        try:
            return _kept(model, kind, fingerprint, released)
        # MemoryError and RuntimeError: of mappings, where addresses are scarce. NotImplementedError, which is one: of
        # locks, where there are none.
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            logger.warning("packed weights are not kept in the cache: %s", error)
    return PackedModel(model, kind, lambda name, source: released(PackedMatrix.of(source, kind)), fingerprint)


def _released(fingerprint: WeightFingerprint) -> Callable[[PackedMatrix], PackedMatrix]:
    """Gives the model's pages back every few matrices."""
    read = 0

    def after(matrix: PackedMatrix) -> PackedMatrix:
        nonlocal read
        read += 2 * matrix.outputs * matrix.inputs
        if read >= _PIECE:
            fingerprint.release()
            read = 0
        return matrix

    return after


def _kept(
    model: Any, kind: str, fingerprint: WeightFingerprint, released: Callable[[PackedMatrix], PackedMatrix]
) -> PackedModel:
    name = _name(model, kind, fingerprint)
    folder = hub.cache_dir() / "packs" / name
    family = family_of(model)
    assert family is not None

    def build(scratch: Path, new: Path) -> None:
        sources = matrices_of(model, family)
        _check_room(scratch, model, kind)
        with (new / FILE).open("wb") as file:
            written = PackWriter(file, name)
            for each, source in sources.items():
                written.add(each, released(PackedMatrix.of(source, kind)))
            written.end()
        (new / f"{FILE}.sha256").write_text(hub.sha256_of(new / FILE))
        if not fingerprint.matches(weights_of(model), entirely=True):
            raise ValueError("the model's weights were changed while they were packed")

    _clear_leftovers(folder.parent)
    made = hub.build_once(folder, build, lambda folder: intact(folder, name, kind))
    stored = read_pack(made / FILE, name, kind)
    with suppress(OSError):  # a cache that may only be read
        os.utime(made)
    _make_room(made)
    return PackedModel(model, kind, lambda name, source: stored[name], fingerprint)


def _name(model: Any, kind: str, fingerprint: WeightFingerprint) -> str:
    family = family_of(model)
    assert family is not None
    digest = hashlib.sha256()
    for file in _LAYOUT:
        digest.update(Path(__file__).with_name(file).read_bytes())
    digest.update(repr((kind, family, numbers_of(model, family), fingerprint.name, _held(model))).encode())
    return digest.hexdigest()[:32]


def _held(model: Any) -> list[tuple[str, int]]:
    """Under each name the place in `weights_of`, where a weight that several modules share is listed once."""
    places = {id(weight): place for place, weight in enumerate(weights_of(model))}
    return [
        (f"{path}.{name}", places[id(weight)])
        for path, module in model.named_modules(remove_duplicate=False)
        for store in (module._parameters, module._buffers)
        for name, weight in store.items()
        if weight is not None
    ]


def intact(folder: Path, name: str, kind: str) -> bool:
    """Whether a folder holds the pack of that name and kind, as it was written.

    RuntimeError or MemoryError where it cannot be mapped, which is no fault of its own: it stays.
    """
    try:
        if (folder / f"{FILE}.sha256").read_text() != hub.sha256_of(folder / FILE):
            return False
        read_pack(folder / FILE, name, kind)
    except (OSError, ValueError, NotImplementedError):
        return False
    return True


class PackWriter:
    """Writes matrices one after the other, so that no more than one is in memory, and at the end the header that says
    where they lie."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._end = file, 0
        self._header: dict[str, Any] = {"__metadata__": {"name": name}}
        file.seek(_HEADER)

    def add(self, name: str, matrix: PackedMatrix) -> None:
        shape = f"{matrix.kind} {matrix.outputs} {matrix.inputs}"
        self._header["__metadata__"][name] = shape
        for part, tensor in matrix.stored.items():
            self._write(f"{name}.{part}", tensor)
            if gap := -self._end % _LINE:
                self._write(f"{name}.{part}.gap", torch.zeros(gap, dtype=torch.uint8, device="cpu"))

    def _write(self, name: str, tensor: Tensor) -> None:
        places = [self._end, self._end + tensor.nbytes]
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._end = places[1]

    def end(self) -> None:
        header = json.dumps(self._header).encode()
        room = _HEADER - 8
        if len(header) > room:
            raise ValueError(f"the model has too many matrices for one file of packed weights: {len(self._header)}")
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))


def read_pack(path: Path, name: str, kind: str) -> dict[str, PackedMatrix]:
    """The matrices of a file, mapped. ValueError where it is damaged, or is not the pack of that name and kind."""
    found = {}
    with reading(path), safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if metadata.pop("name", None) != name:
            raise ValueError("it holds other weights than its place says")
        tensors = {key: file.get_tensor(key) for key in file.keys() if not key.endswith(".gap")}  # noqa: SIM118
        for matrix, shape in metadata.items():
            stored_as, outputs, inputs = shape.split()
            if stored_as != kind:
                raise ValueError(f"{matrix} is in {stored_as}, and {kind} was asked for")
            parts = {
                part: tensors[key] for part in ("panels", "scales", "bias") if (key := f"{matrix}.{part}") in tensors
            }
            found[matrix] = PackedMatrix.of_stored(kind, int(outputs), int(inputs), parts)
    return found


def _check_room(folder: Path, model: Any, kind: str) -> None:
    """OSError where the disk has no room for a pack of this kind."""
    needed, free = _bytes_of_pack(model, kind), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{hub.cache_dir()} has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB may be needed there")


def _bytes_of_pack(model: Any, kind: str) -> int:
    """The size of a pack's file, or slightly more: each layer's outputs and inputs count as padded, though some are
    laid out together. A weight that several layers share is in every one's matrix."""
    family = family_of(model)
    assert family is not None
    linears = [model.get_output_embeddings(), *(each for parts in layers_of(model, family) for each in parts.linears)]
    size = float(_HEADER)
    for linear in linears:
        outputs, inputs = linear.weight.shape
        size += up(outputs, PANEL) * (up(inputs, INPUTS[kind]) * _BYTES[kind] + 4 * (linear.bias is not None))
    return int(size)


def _clear_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half made. Only who holds a pack's lock makes some, so only they may.

    The empty files of the locks stay: who waits for one that is deleted holds another than who comes next.
    """
    for leftover in folder.glob(".*-*"):
        name = leftover.name[1:].rpartition("-")[0]
        with suppress(OSError, NotImplementedError), FileLock(folder / f".{name}.lock").acquire(blocking=False):
            shutil.rmtree(leftover, ignore_errors=True)


def _make_room(used: Path) -> None:
    """Keeps the packs that were used last, as many as may be kept together, and deletes the others."""
    packs = {}
    for folder in used.parent.iterdir():
        try:
            if not folder.name.startswith("."):
                packs[folder] = folder.stat().st_mtime, (folder / FILE).stat().st_size
        except OSError:  # another process is deleting it
            continue
    left = MOST
    for folder, (_, size) in sorted(packs.items(), key=lambda each: (each[0] == used, each[1]), reverse=True):
        if folder == used or size <= left:
            left -= size
        else:
            shutil.rmtree(folder, ignore_errors=True)
