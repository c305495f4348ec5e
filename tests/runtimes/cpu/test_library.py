"""The compiled library's file, and what may be handed to it."""

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.library import address, floats
from tests.support import arm

NEEDED = {
    "of another type": (torch.zeros(4, dtype=torch.bfloat16), 4),
    "too short": (torch.zeros(3), 4),
    "not side by side": (torch.zeros(4, 2)[:, 0], 4),
    "transposed": (torch.zeros(2, 3).T, 6),
    "without numbers": (torch.zeros(4, device="meta"), 4),
    "sparse": (torch.zeros(4).to_sparse(), 4),
}


@pytest.mark.parametrize("why", NEEDED)
def test_no_address_is_given_of_what_is(why):
    tensor, size = NEEDED[why]
    with pytest.raises(ValueError, match="compiled code"):
        address(tensor, torch.float32, size)


def test_addresses_are_of_what_is_asked_for():
    tensor = torch.zeros(4)
    assert address(tensor, torch.float32, 4) == address(tensor, torch.float32, 0) == tensor.data_ptr()
    array = np.zeros(3, dtype=np.int32)
    assert address(torch.from_numpy(array), torch.int32, 3) == array.ctypes.data


def test_floats_are_floats_whatever_the_defaults():
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            made = floats(2, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (made.dtype, made.device.type, made.shape) == (torch.float32, "cpu", (2, 3))


def cut(share):
    return lambda data: data[: int(len(data) * share)]


def flip(share):
    def damage(data):
        place = int(len(data) * share)
        return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]

    return damage


DAMAGES = {"empty": cut(0), "cut to 1 %": cut(0.01), "cut to a half": cut(0.5), "cut to 99 %": cut(0.99)}
DAMAGES |= {f"a bit at {share:.0%}": flip(share) for share in (0.0, 0.1, 0.5, 0.9)}

USE = """
    import torch
    from medusa_apar.runtimes.cpu import library, weights
    found = library.outcome()
    assert not isinstance(found, str), found
    assert weights.argmax(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [1]
"""


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A compiler that copies: what is made is always the same, and at once."""
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nfor name; do :; done\n[ "$name" = --version ] || head -c 5000 /dev/zero | tr "\\0" x > "$name"\n'
    )
    compiler.chmod(0o755)
    return [str(compiler)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_made_anew(damage, quick, capfd):
    made = library._compiled(quick)
    whole = made.read_bytes()
    assert library._compiled(quick) == made and "damaged" not in capfd.readouterr().err
    made.write_bytes(DAMAGES[damage](whole))
    assert library._compiled(quick) == made and made.read_bytes() == whole
    assert f"medusa-apar: {made.parent} is damaged and is made anew" in capfd.readouterr().err
    assert library._compiled(quick) == made and "damaged" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["step.so", "step.so.sha256"])
def test_what_a_cleaner_took_is_made_anew(name, quick):
    made = library._compiled(quick)
    (made.parent / name).unlink()
    assert library._compiled(quick) == made and library._intact(made.parent)


def test_whoever_finds_damage_at_once_gets_one_that_is_whole(quick):
    made = library._compiled(quick)
    whole = made.read_bytes()
    made.write_bytes(whole[:100])
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda _: library._compiled(quick).read_bytes() == whole, range(8)))
    assert all(found)


def test_a_process_survives_damage(tmp_path):
    """One of its own: to open a file that was cut short ends it."""
    real = Path(library.library()._name)
    made = shutil.copytree(real.parent, tmp_path / "cpu" / real.parent.name) / real.name
    made.write_bytes(DAMAGES["cut to a half"](made.read_bytes()))
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(USE)]
    environment = os.environ | {"MEDUSA_APAR_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is damaged and is made anew" in done.stderr


def test_a_compiler_that_fails_is_asked_once(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    library.outcome.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="cannot compile"):
                library.library()
    finally:
        library.outcome.cache_clear()
    assert len((tmp_path / "asked").read_text().split()) == 2  # its version, and to compile


def test_a_cache_tells_processors_of_arm_apart(tmp_path):
    def told(text):
        (tmp_path / "cpuinfo").write_text(text)
        return library.processor(tmp_path / "cpuinfo")

    core = arm.CPUINFO
    little = core.replace("processor\t: 0", "processor\t: 1").replace("0xd40", "0xd46")
    assert told(core) == told(core.replace("2100", "50") * 64)
    others = [core.replace(f" {name}", "") for name in ("asimddp", "i8mm")]
    assert len({told(text) for text in (core, core + little, core.replace("0x41", "0x61"), *others)}) == 5
