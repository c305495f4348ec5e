"""The hidden states that heads read, taken out of a base model's forward pass by hooks."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


def aux_layer_modules(model: PreTrainedModel, aux_layers: tuple[int, ...]) -> list[nn.Module]:
    """The decoder layers of these indices; ValueError where the model has none of that number."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"cannot find the {count} layers of {type(model).__name__} that heads with aux_layers read.")
    for layer in aux_layers:
        if not 0 <= layer < count:
            raise ValueError(
                f"these heads read base layer {layer}, but {type(model).__name__} has layers 0 to {count - 1}."
            )
    return [lists[0][layer] for layer in aux_layers]


class Kept(NamedTuple):
    """What a forward pass keeps beside logits and final states: aux layers' outputs, and states at these boundaries."""

    aux_layers: tuple[int, ...]
    boundaries: tuple[int, ...]


class Captured:
    """Within a `with` block: what the unembedding is given and what auxiliary layers put out, in this thread's calls.

    boundaries: b stands for the output of the first b layers; each from 1 on.

    Other threads may run the same model meanwhile.
    """

    def __init__(
        self, model: PreTrainedModel, aux_layers: tuple[int, ...] = (), boundaries: tuple[int, ...] = ()
    ) -> None:
        self._unembedding = model.get_output_embeddings()
        read = (*aux_layers, *(boundary - 1 for boundary in boundaries))
        self._layers = aux_layer_modules(model, read) if read else []
        self._num_aux = len(aux_layers)
        self._thread = threading.get_ident()
        self._final: Tensor | None = None
        self._aux: list[Tensor | None] = [None] * len(self._layers)
        self._handles: list[Any] = []

    def __enter__(self) -> Captured:
        if self._unembedding is not None:
            self._handles.append(self._unembedding.register_forward_pre_hook(self._take_final))
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(partial(self._take_tap, index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_final(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == self._thread:
            self._final = args[0]

    def _take_tap(self, index: int, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._aux[index] = output[0] if isinstance(output, tuple) else output

    def hidden_states(
        self, rows: Tensor | None = None, final: Tensor | None = None, kept: bool | None = None
    ) -> Tensor:
        """[rows, input_size] of a pass over one sequence: the final states, then the auxiliary ones at unit scale.

        final: [rows, H] where the caller has it already; `rows` then selects from the aux_layers alone.
        kept: whether the model was told to keep `rows` only; None goes by how many it kept.
        """
        if final is None:
            assert self._final is not None
            final = self._final[0]
            if rows is not None and (len(final) != len(rows) if kept is None else not kept):
                final = final[rows]
        parts = [final]
        for aux in self._aux[: self._num_aux]:
            assert aux is not None
            states = aux[0] if rows is None else aux[0, rows]
            # Depths differ in scale, and a few positions exceed the rest a thousandfold: float16 would not hold them.
            parts.append(F.rms_norm(states.float(), states.shape[-1:]).to(final.dtype))
        return torch.cat(parts, dim=-1) if self._num_aux else final

    def boundary_states(self) -> Tensor:
        """[N, boundaries * H] of a pass over one sequence, as they are."""
        found = [aux[0] for aux in self._aux[self._num_aux :] if aux is not None]
        return torch.cat(found, dim=-1)
