"""Weight matrices in the layout of `matrix.h`: panels of 16 outputs, padded with zeros, made once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import library

PANEL = 16
GROUP_INPUTS = 64
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}


class PackedMatrix:
    """A weight [outputs, inputs] and its bias, as `kind` stores them; `struct` is what compiled code reads.

    int8 has a scale per output and 64 inputs, the largest of these weights becoming 127, and no zero point.
    """

    def __init__(self, weight: Tensor, kind: str, bias: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        outputs, inputs = _up(self.outputs, PANEL), _up(self.inputs, GROUP_INPUTS if kind == "int8" else 1)
        whole = torch.zeros(outputs, inputs)
        whole[: self.outputs, : self.inputs] = weight.detach().float()
        self.kind = kind
        self.scales: Tensor | None = None
        if kind == "int8":
            groups = whole.view(outputs, -1, GROUP_INPUTS)
            scales = groups.abs().amax(-1) / 127
            # Zero groups keep a scale of zero and divide by one.
            steps = (groups / scales.where(scales > 0, 1.0)[..., None]).round().to(torch.int8)
            self.scales = scales.view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()
            panels = steps.view(-1, PANEL, inputs // 2, 2).transpose(1, 2)
        else:
            panels = whole.to(getattr(torch, kind)).view(-1, PANEL, inputs).transpose(1, 2)
        self.panels = panels.contiguous()
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(outputs)
            self.bias[: self.outputs] = bias.detach().float()
        self.struct = library.Matrix(
            *(KINDS[kind], outputs, inputs, self.panels.data_ptr()),
            *(None if tensor is None else tensor.data_ptr() for tensor in (self.scales, self.bias)),
        )

    def dense(self) -> Tensor:
        """float32 [outputs, inputs], what the stored weight stands for: the specification of its products."""
        whole = self.panels.float().transpose(1, 2).reshape(len(self.panels) * PANEL, -1)
        if self.scales is not None:
            scales = self.scales.transpose(1, 2).reshape(len(whole), -1)
            whole = (whole.view(*scales.shape, GROUP_INPUTS) * scales[..., None]).view(whole.shape)
        return whole[: self.outputs, : self.inputs]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., inputs] -> [..., outputs]; a row's bits do not depend on the other rows."""
        rows = x.reshape(-1, self.inputs).float().contiguous()
        out = torch.empty(len(rows), self.outputs)
        act = torch.empty(len(rows), self.struct.inputs, dtype=torch.int16) if self.kind == "int8" else None
        scales = torch.empty(len(rows)) if self.kind == "int8" else None
        library.library().mapar_linear(
            self.struct,
            *(rows.data_ptr(), len(rows), self.inputs, out.data_ptr(), self.outputs),
            *(None if tensor is None else tensor.data_ptr() for tensor in (act, scales)),
            torch.get_num_threads(),
        )
        return out.view(*x.shape[:-1], self.outputs)


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of float32 logits [..., width]: the `count` likeliest, log-probabilities and indices [..., count], best first and
    of equals the first."""
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    assert rows.dtype == torch.float32 and 0 < count <= rows.shape[1]
    values, sums = torch.empty(len(rows), count), torch.empty(len(rows), 1)
    indices = torch.empty(len(rows), count, dtype=torch.long)
    library.library().mapar_top(
        *(rows.data_ptr(), len(rows), rows.shape[1], count),
        *(indices.data_ptr(), values.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
    )
    shape = (*logits.shape[:-1], count)
    return (values - sums).view(shape), indices.view(shape)


def argmax(logits: Tensor) -> Tensor:
    """Of float32 logits [rows, width]: the index of the largest, and of equals the first, [rows]."""
    rows = logits.contiguous()
    values, indices = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.long)
    library.library().mapar_top(
        *(rows.data_ptr(), len(rows), rows.shape[1], 1),
        *(indices.data_ptr(), values.data_ptr(), None, torch.get_num_threads()),
    )
    return indices


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Two weights of one shape, panel by panel by turns, so that one tile holds both of an output."""
    panels = [weight.reshape(-1, PANEL, weight.shape[1]) for weight in (first, second)]
    return torch.stack(panels, 1).reshape(-1, first.shape[1])


def joined(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Their biases, one after the other; None where none has any."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([torch.zeros(x.out_features) if x.bias is None else x.bias.detach().float() for x in layers])


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
