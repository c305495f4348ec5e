"""Kernels under Triton's interpreter: the folder is collected only where TRITON_INTERPRET was set before the start.

A plain run of the suite runs it in a process of its own (tests/triton_kernels/test_interpreted.py).
"""

import functools
import inspect
import os
import random

import pytest

from medusa_apar.runtimes import pick

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once_a_launch():
    """Triton's interpreter puts its own functions into `tl` at every launch, and again at every call of a device
    function, where they are there already: a fifth of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()

    @functools.cache
    def languages(fn) -> frozenset[str]:
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(value.__name__ for value in seen if value in (tl, tl.core))

    def once(fn):
        if (seen := languages(fn)) not in patched:
            patched.add(seen)
            return patch_lang(fn)

    def launched(self, *args, **kwargs):
        patched.clear()  # a launch takes back what it has patched
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


@pytest.fixture(scope="session", autouse=True)
def _families_checked_once():
    """`attach` compares a few logits with the model's own, which takes the interpreter seconds: once a family."""

    check, checked = pick.check_agrees, set()

    def once(model, runtime, largest):
        kind = model.config.to_json_string(), runtime.facts.backend, runtime.facts.kind
        if kind not in checked:
            check(model, runtime, largest)
            checked.add(kind)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pick, "check_agrees", once)
        yield


@pytest.fixture
def shuffled_programs(monkeypatch):
    """Call it with a seed: the programs of each launch then run in another order than that of their ids."""
    from triton.runtime.interpreter import interpreter_builder

    order: list[tuple[int, int, int]] = []
    seed = 0
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def start_launch(*dims):
        set_dim(*dims)
        order[:] = [(x, y, z) for x in range(dims[0]) for y in range(dims[1]) for z in range(dims[2])]
        random.Random(seed).shuffle(order)

    def shuffle(new_seed):
        nonlocal seed
        seed = new_seed
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", start_launch)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *index: set_index(*order.pop()))

    return shuffle
