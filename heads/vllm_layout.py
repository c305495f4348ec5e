"""The layout that vLLM's Medusa drafter loads: `model.safetensors`, and a config that says how to read it.

    blocks.{h}.layers.{l}.weight|bias   with biases or without (`medusa_fc_bias`), and either
    lm_heads.{h}.weight                 an unembedding a head, or
    lm_head.weight                      the base's, once for all heads (`original_lm_head`)

Every unembedding has a row for each of the target's tokens. vLLM knows a truncated draft vocabulary too, but 0.32 does
not load one: it makes `token_map` a parameter, and then finds that no weight of that name was loaded. So heads that
know a part of the vocabulary get the rows they lack from the base. They draft from all of it then, which changes how
often they are right and never the answer.

What else vLLM would get wrong in silence: another `vocab_size` than the target's, which it replaces; `architectures` of
the base, as which it would build the drafter. And it builds `num_speculative_tokens` heads, whatever `num_heads` says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medusa_apar.models.base_model import Base
from medusa_apar.models.head_files import FILES, FULL_MODEL_FILES, SUBFOLDER
from medusa_apar.reading import expanded

from .checkpoints import HeadFile
from .layouts import Heads, bias_of, check_free, known_ids, own_base, read, write_alone

FILE = "model.safetensors"


def export(
    source: str | Path,
    base: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Medusa heads of `source` (folder, file or Hub id, in any layout) as a drafter for vLLM in folder `out`, where
    heads of an earlier run are replaced. Returns how many there are, which is the most `num_speculative_tokens`.

    base: the model that vLLM serves (folder, embedded name or Hub id), whose unembedding is written along.
    dtype: of all floating point tensors written; None keeps each one's own.
    trust_remote_code: whether code from the base's repository may run.

    ValueError: other heads than Medusa's, heads of another model, or broken files. FileNotFoundError: no heads.
    FileExistsError: `out` holds a model, or heads that would be read instead. Nothing is written in any of these cases.
    """
    folder = expanded(out)
    heads = read(source)
    check(folder, force=True)
    target = in_layout(heads, Base(str(base), trust_remote_code), trust_remote_code)
    write_alone(folder, state_dict(target), config(target), dtype, FILE)
    return target.file.num_heads


def check(folder: Path, force: bool) -> None:
    """FileExistsError if writing into `folder` would destroy something, or if something else would be read from it."""
    check_free(folder, (*FILES, FILE), force)
    inner = folder / SUBFOLDER
    if any((inner / name).exists() for name in FILES + FULL_MODEL_FILES):
        raise FileExistsError(f"{inner} holds heads, which would be read instead of new ones: choose another folder")


def in_layout(heads: Heads, given: Base | None, trust_remote_code: bool) -> Heads:
    """The same heads with what vLLM needs of `given`, or of the base that they name. ValueError: it cannot be had."""
    file, owner = heads.file, given
    if owner is None and lacks_rows(file):
        owner = own_base(heads, "vLLM's layout holds rows of its unembedding", trust_remote_code)
    if file.token_map is not None:
        heads.notes.append(
            f"token_map is left out, as vLLM cannot load it: these heads, which draft from {len(file.token_map)} "
            "tokens, draft from the whole vocabulary there."
        )
    whole = with_whole_rows(file, None if owner is None else owner.unembedding)
    return replace(heads, file=whole, vocab_size=len(_rows(whole)))


def lacks_rows(file: HeadFile) -> bool:
    """Whether some token of the vocabulary has no row in the file: it has none at all, or those of the token_map."""
    rows = file.shared if file.shared is not None else file.unembeddings.get(0)
    return rows is None or (file.token_map is not None and len(rows) == len(file.token_map))


def with_whole_rows(file: HeadFile, unembedding: Tensor | None) -> HeadFile:
    """The same heads with a row for every token, and so without token_map.

    unembedding: [vocabulary, H], the target's; None where it is not known, and the file lacks no rows. A head's own
    rows stay as they are, and those it lacks are the target's in the head's dtype. ValueError: it is another model's.
    """
    if unembedding is not None and unembedding.shape[1] != file.hidden_size:
        raise ValueError(f"these heads have hidden size {file.hidden_size}, and the base has {unembedding.shape[1]}")
    own = {head: _whole(rows, file.token_map, unembedding) for head, rows in file.unembeddings.items()}
    shared = unembedding if file.shared is None else _whole(file.shared, file.token_map, unembedding)
    return replace(file, unembeddings=own, shared=None if own else shared, token_map=None)


def _whole(rows: Tensor, token_map: Tensor | None, unembedding: Tensor | None) -> Tensor:
    if unembedding is None:
        return rows
    if token_map is not None and len(rows) == len(token_map):
        places = known_ids(token_map, len(unembedding))
    elif len(rows) > len(unembedding):
        raise ValueError(f"these heads draft from {len(rows)} tokens, and the base has {len(unembedding)}")
    elif len(rows) == len(unembedding):
        return rows
    else:  # a model that has gained tokens
        places = torch.arange(len(rows))
    whole = unembedding.to(rows.dtype, copy=True)
    whole[places] = rows
    return whole


def _rows(file: HeadFile) -> Tensor:
    rows = file.unembeddings.get(0, file.shared)
    assert rows is not None
    return rows


def state_dict(heads: Heads) -> dict[str, Tensor]:
    """The tensors of what `in_layout` returns, by the names above."""
    state = {}
    for (head, layer), block in heads.file.blocks.items():
        state[f"blocks.{head}.layers.{layer}.weight"] = block["weight"]
        if heads.has_bias:
            state[f"blocks.{head}.layers.{layer}.bias"] = bias_of(block)
    state |= {f"lm_heads.{head}.weight": rows for head, rows in heads.file.unembeddings.items()}
    return state if heads.file.shared is None else state | {"lm_head.weight": heads.file.shared}


def config(heads: Heads) -> dict[str, Any]:
    """What vLLM reads beside the tensors, and what the way back needs."""
    file = heads.file
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": file.hidden_size,
        "vocab_size": heads.vocab_size,
        "truncated_vocab_size": heads.vocab_size,
        "num_heads": file.num_heads,
        "num_hidden_layers": file.num_layers,
        "medusa_fc_bias": heads.has_bias,
        "original_lm_head": file.shared is not None,
        "base_model_name_or_path": heads.base,
    } | heads.extra
