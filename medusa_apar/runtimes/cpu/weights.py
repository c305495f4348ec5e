"""Weight matrices in the layout of `matrix.h`: panels of 16 outputs, padded with zeros, made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import library
from .library import address, floats

PANEL = 16
GROUP_INPUTS = 64
_BLOCK = 16 * PANEL  # outputs that are laid out at once
Source = Callable[[], tuple[Tensor, Tensor | None]]  # makes a matrix's weight [outputs, inputs] and bias when called
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
INPUTS = {"float32": 1, "bfloat16": 32, "int8": GROUP_INPUTS}  # what inputs are padded to a multiple of
_TOGETHER = {"float32": 1, "bfloat16": 2, "int8": 4}  # inputs of an output side by side


class PackedMatrix:
    """A weight [outputs, inputs] and its bias, as `kind` stores them; `struct` is what compiled code reads.

    int8 has a scale per output and 64 inputs, the largest of these weights becoming 127, and no zero point; the 64 are
    turned by `hadamard` first, as activations are.
    """

    def __init__(self, weight: Tensor, kind: str, bias: Tensor | None = None) -> None:
        self._take(kind, weight.shape[0], weight.shape[1], laid_out(weight, kind, bias))

    @classmethod
    def of(cls, source: Source, kind: str) -> PackedMatrix:
        weight, bias = source()
        return cls(weight, kind, bias)

    @classmethod
    def of_stored(cls, kind: str, outputs: int, inputs: int, stored: Mapping[str, Tensor]) -> PackedMatrix:
        """One whose `stored` was laid out before; ValueError where these tensors are not that."""
        matrix = cls.__new__(cls)
        matrix._take(kind, outputs, inputs, stored)
        return matrix

    def _take(self, kind: str, outputs: int, inputs: int, stored: Mapping[str, Tensor]) -> None:
        self.kind, self.outputs, self.inputs, self.stored = kind, outputs, inputs, dict(stored)
        panels, self.scales, self.bias = (self.stored.get(name) for name in ("panels", "scales", "bias"))
        outputs, inputs = up(outputs, PANEL), up(inputs, INPUTS[kind])
        dtype = torch.int8 if kind == "int8" else getattr(torch, kind)
        if panels is None or (self.scales is None) == (kind == "int8"):
            raise ValueError(f"a matrix in {kind} is not made of {' and '.join(self.stored)}.")
        self.panels = panels
        self.struct = library.Matrix(
            *(KINDS[kind], outputs, inputs, address(self.panels, dtype, outputs * inputs)),
            None if self.scales is None else address(self.scales, torch.float32, outputs * inputs // GROUP_INPUTS),
            None if self.bias is None else address(self.bias, torch.float32, outputs),
        )

    def dense(self) -> Tensor:
        """float32 [outputs, padded inputs], what the stored weight stands for: the specification of its products. In
        int8 something is left of the padding, where `rounded` leaves something too."""
        whole = self.panels.float().transpose(1, 2).reshape(len(self.panels) * PANEL, -1)
        if self.scales is not None:
            scales = self.scales.transpose(1, 2).reshape(len(whole), -1)
            whole = hadamard(whole.view(*scales.shape, GROUP_INPUTS) * scales[..., None]).view(whole.shape)
        return whole[: self.outputs]

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., inputs] -> [..., outputs]; a row's bits do not depend on the other rows."""
        rows = x.reshape(-1, self.inputs).float().contiguous()
        count, inputs = len(rows), self.struct.inputs
        out, steps, groups = floats(count, self.outputs), floats(count, inputs), floats(count, inputs // 32 + 1)
        library.library().mapar_linear(
            self.struct,
            *(address(rows, torch.float32, count * self.inputs), count, self.inputs),
            *(address(out, torch.float32, count * self.outputs), self.outputs),
            *(address(steps, torch.float32, count * inputs), address(groups, torch.float32, count * (inputs // 32))),
            torch.get_num_threads(),
        )
        return out.view(*x.shape[:-1], self.outputs)


def laid_out(weight: Tensor, kind: str, bias: Tensor | None = None) -> dict[str, Tensor]:
    """What `PackedMatrix` stores of a weight [outputs, inputs] and a bias [outputs]: "panels", int8's "scales", and
    "bias" where there is one. Little more than the result is in memory at once."""
    weight = weight.detach()
    found = _compiled(weight) if kind == "int8" else None
    if found is None:
        found = _in_blocks(weight, kind)
    if bias is not None:
        found["bias"] = floats(up(len(weight), PANEL)).zero_()
        found["bias"][: len(bias)] = bias.detach().float()
    return found


def _compiled(weight: Tensor) -> dict[str, Tensor] | None:
    """int8's panels and scales by compiled code, to the bit what torch makes of finite weights; None where there is no
    such code, or it cannot read them as they lie there."""
    kind = str(weight.dtype).removeprefix("torch.")
    readable = kind in ("float32", "bfloat16") and weight.device.type == "cpu" and weight.is_contiguous()
    if not readable or isinstance(library.outcome(), str):
        return None
    (outputs, inputs), groups = weight.shape, up(weight.shape[1], GROUP_INPUTS) // GROUP_INPUTS
    panels = up(outputs, PANEL) // PANEL
    steps = torch.empty(panels, groups * GROUP_INPUTS // 4, PANEL, 4, dtype=torch.int8, device="cpu")
    scales = floats(panels, groups, PANEL)
    library.library().mapar_pack_int8(
        *(address(weight, weight.dtype, outputs * inputs), KINDS[kind], outputs, inputs),
        address(steps, torch.int8, steps.numel()),
        *(address(scales, torch.float32, scales.numel()), torch.get_num_threads()),
    )
    return {"panels": steps, "scales": scales}


def _in_blocks(weight: Tensor, kind: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for first in range(0, len(weight), _BLOCK):
        for name, part in _panels(weight[first : first + _BLOCK], kind).items():
            if name not in found:
                panels = up(len(weight), PANEL) // PANEL
                found[name] = torch.empty(panels, *part.shape[1:], dtype=part.dtype, device="cpu")
            found[name][first // PANEL : first // PANEL + len(part)] = part
    return found


def _panels(rows: Tensor, kind: str) -> dict[str, Tensor]:
    """Some outputs' weights [outputs, inputs], laid out: tensors [panels, ...], which no other output has a part in."""
    outputs, inputs = up(len(rows), PANEL), up(rows.shape[1], INPUTS[kind])
    whole = floats(outputs, inputs).zero_()
    whole[: len(rows), : rows.shape[1]] = rows.float()
    found = {}
    if kind == "int8":
        groups = hadamard(whole.view(outputs, -1, GROUP_INPUTS))
        scales = groups.abs().amax(-1) / 127
        # Zero groups keep a scale of zero and divide by one.
        steps = (groups / scales.where(scales > 0, 1.0)[..., None]).round().to(torch.int8)
        found["scales"] = scales.view(-1, PANEL, scales.shape[1]).transpose(1, 2)
    else:
        steps = whole.to(getattr(torch, kind))
    found["panels"] = steps.view(-1, PANEL, inputs // _TOGETHER[kind], _TOGETHER[kind]).transpose(1, 2)
    return found


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest of float32 logits [..., width]: log-probabilities and indices [..., count], the best
    first; among equals the lower index."""
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    assert 0 < count <= rows.shape[1]
    values, indices, sums = top_of_rows(rows, None, count)
    shape = (*logits.shape[:-1], count)
    return (values - sums[:, None]).float().view(shape), indices.view(shape)


def argmax(logits: Tensor) -> Tensor:
    """The index [rows] of the largest of float32 logits [rows, width]; among equals the lower one."""
    return top_of_rows(logits.contiguous(), None, 1, summed=False)[1].view(-1)


def top_of_rows(
    logits: Tensor, places: Tensor | None, count: int, summed: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """values float32 and indices [rows, count] of float32 logits [*, width], and float64 [rows], if `summed`, the
    logarithms of the sums of all exponentials. places: int64 [rows], which rows; None for all."""
    size, width = len(logits) if places is None else len(places), logits.shape[1]
    values, indices = floats(size, count), torch.empty(size, count, dtype=torch.long, device="cpu")
    sums = torch.empty(size if summed else 0, dtype=torch.float64, device="cpu")
    library.library().mapar_top(
        address(logits, torch.float32, logits.numel()),
        None if places is None else address(places, torch.long, size),
        *(size, width, count),
        *(address(indices, torch.long, size * count), address(values, torch.float32, size * count)),
        *(address(sums, torch.float64, size) if summed else None, torch.get_num_threads()),
    )
    return values, indices, sums


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Two weights of one shape, panel by panel by turns, so that one tile holds both of an output."""
    panels = [weight.reshape(-1, PANEL, weight.shape[1]) for weight in (first, second)]
    return torch.stack(panels, 1).reshape(-1, first.shape[1])


def joined(layers: Sequence[nn.Linear]) -> Tensor | None:
    """Their biases, one after the other; None where none has any."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([floats(x.out_features).zero_() if x.bias is None else x.bias.detach().float() for x in layers])


def hadamard(groups: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of float32 [..., 64], its own inverse, sums in the order of `vectors.h`."""
    size = groups.shape[-1]
    for width in (2**stage for stage in range(size.bit_length() - 1)):
        low, high = groups.reshape(*groups.shape[:-1], -1, 2, width).unbind(-2)
        groups = torch.stack((low + high, low - high), -2).view(groups.shape)
    transformed: Tensor = groups / size**0.5
    return transformed


def rounded(x: Tensor) -> Tensor:
    """float32 [..., inputs] -> [..., padded inputs]: what int8 products make of activations first, a step per row and
    64 inputs: the specification of `int8.h`'s quantise_int8."""
    padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP_INPUTS))
    groups = hadamard(padded.view(*x.shape[:-1], -1, GROUP_INPUTS)) * GROUP_INPUTS**0.5
    peaks = groups.abs().amax(-1, keepdim=True)
    scales = peaks / 127 / GROUP_INPUTS**0.5 * (peaks >= 1e-36)
    # In float64, where the product is exact: compiled code rounds it once, to an integer, by a fused multiply-add.
    steps = (groups.double() * (127 / peaks.clamp_min(1e-36)).double()).round().float() * scales
    return hadamard(steps).view(padded.shape)


def up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
