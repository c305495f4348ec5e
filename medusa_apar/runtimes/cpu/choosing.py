"""Which tokens rows choose, all requests' rows in one call of compiled code: see `choose.h`."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_apar.verify.logprobs import Top
from medusa_apar.verify.recipe import Choices, Chosen, Recipe

from . import library
from .library import address
from .weights import top_of_rows

# In the order of `scores.h`.
_KINDS = (
    *("repetition", "presence_frequency", "bias", "min_length", "suppress", "held_back", "mask", "bans"),
    *("temperature", "top_k", "top_p", "min_p", "typical"),
)
_made: weakref.WeakKeyDictionary[Recipe, tuple[Any, list[Any]]] = weakref.WeakKeyDictionary()
_made_lock = threading.Lock()


class CompiledChooser:
    """`verify.recipe.Chooser`, for float32 logits."""

    def choose(self, logits: Tensor, choices: Choices) -> Chosen:
        count, vocabulary = len(choices.rows), logits.shape[1]
        recipes = (library.Recipe * len(choices.recipes))(*map(_struct, choices.recipes))
        rows, paths, masks = (torch.from_numpy(part) for part in (choices.rows, choices.paths, choices.masks))
        tokens = torch.empty(count, dtype=torch.long, device="cpu")
        judged = torch.full((2, count), -torch.inf, dtype=torch.float64, device="cpu")
        library.library().mapar_choose(
            library.Choices(
                *(count, vocabulary, address(rows, torch.long, rows.numel()), recipes),
                *(address(paths, torch.long, len(paths)), address(logits, torch.float32, logits.numel())),
                *(address(masks, torch.int32, masks.numel()), masks.shape[1]),
                address(tokens, torch.long, count),
                *(address(part, torch.float64, count) for part in judged),
            ),
            torch.get_num_threads(),
        )
        return Chosen(tokens.tolist(), *judged.tolist())

    def top(self, logits: Tensor, rows: np.ndarray, count: int) -> Top:
        assert rows.min() >= 0 and rows.max() < len(logits)
        values, ids, log_sums = top_of_rows(logits, torch.from_numpy(rows), count)
        return Top(ids.numpy(), values.numpy(), log_sums.numpy())


def _struct(recipe: Recipe) -> Any:
    """A recipe as compiled code reads it; made once, and kept as long as the recipe."""
    with _made_lock:
        found = _made.get(recipe)
        if found is None:
            found = _made[recipe] = _packed(recipe)
    return found[0]


def _packed(recipe: Recipe) -> tuple[Any, list[Any]]:
    """The struct, and what it points to."""
    held: list[Any] = []
    operations = (library.Operation * len(recipe.operations))()
    for place, operation in enumerate(recipe.operations):
        ids = torch.tensor(operation.ids, dtype=torch.long, device="cpu")
        values = torch.tensor(operation.values, dtype=torch.float32, device="cpu")
        held += [ids, values]
        operations[place] = library.Operation(
            *(_KINDS.index(operation.kind), len(ids), operation.length, operation.value),
            *(address(ids, torch.long, len(ids)), address(values, torch.float32, len(values))),
        )
    held.append(operations)
    seed = (recipe.seed or 0) & (2**64 - 1)
    return library.Recipe(len(recipe.operations), recipe.seed is not None, recipe.judged, seed, operations), held
