"""The network of an EAGLE-3 drafter (arXiv 2503.01840, section 3).

The drafter's row for a token t of a path reads the embedding of t and a *feature*: of what the base knew when it chose
t. Behind tokens that the base has run, that is the fusion of its own states at the token before; behind drafted ones,
the drafter's own output at the token before. The row puts out the distribution of the token behind t, and the feature
of that token. Its keys and values belong to t, so that the threads behind a fork share those of what lies before it.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from medusa_apar.drafting.drafter import Attend, Keep
from medusa_apar.runtimes.cpu.weights import PackedMatrix

from .files import SHAPES, Eagle3File


class Drafted(NamedTuple):
    """What the drafter says behind N rows."""

    states: Tensor  # [N, H], what the unembedding reads
    features: Tensor  # [N, H], what the rows of the next tokens read


class Eagle3(nn.Module):
    """The drafter's own weights; embedding and unembedding are the base's where the file has none.

    Weights have the file's dtype and are not trained unless somebody says so.
    """

    def __init__(self, file: Eagle3File) -> None:
        super().__init__()
        self.config, self.num_states = file.config, file.num_states
        self.norm_before_residual, self.norm_output = file.norm_before_residual, file.norm_output
        self.layers: Any = nn.ModuleList(_Layer(file, index) for index in range(len(file.layers)))
        self.norm: nn.Parameter = _fixed(file.norm)
        self.fc, self.fc_bias, self.input_norm = map(_fixed, (file.fc, file.fc_bias, file.input_norm))
        self.state_norms = nn.ParameterList(map(_fixed, file.state_norms))
        self.embedding, self.unembedding = _fixed(file.embedding), _fixed(file.unembedding)
        # In a dict, which torch does not search: frequencies have to stay float32 whatever the weights become. One a
        # device: to copy them there at every step would wait for what the device is doing.
        self._rotaries = {torch.device("cpu"): LlamaRotaryEmbedding(file.config)}
        self.packs: dict[Tensor, PackedMatrix] = {}  # weights that products are made from in another layout

    @property
    def hidden_size(self) -> int:
        return self.norm.numel()

    @property
    def input_size(self) -> int:
        """Width of each state that is fused."""
        return self.hidden_size if self.fc is None else self.fc.shape[1] // self.num_states

    def as_file(self, token_map: Tensor | None, boundaries: tuple[int, ...]) -> Eagle3File:
        """The weights as they are now."""
        return Eagle3File(
            layers=[layer.tensors() for layer in self.layers],
            norm=self.norm.detach(),
            config=self.config,
            **{
                name: _plain(getattr(self, name))
                for name in ("fc", "fc_bias", "input_norm", "embedding", "unembedding")
            },
            state_norms=[norm.detach() for norm in self.state_norms],
            token_map=token_map,
            boundaries=boundaries,
            norm_before_residual=self.norm_before_residual,
            norm_output=self.norm_output,
        )

    def packed(self, packing: str, only_extends: bool = False) -> Eagle3:
        """The same drafter, which multiplies as the CPU runtime does; one that `only_extends` packs no more than that
        takes."""
        other = copy.copy(self)
        attention = ("q_weight", "k_weight", "v_weight")
        whole = (*attention, "o_weight", "gate", "up", "down")
        weights = [self.fc]
        for index, layer in enumerate(self.layers):
            last = only_extends and index == len(self.layers) - 1
            weights += [getattr(layer, name) for name in (attention if last else whole)]
        other.packs = {weight: PackedMatrix(weight, packing) for weight in weights if weight is not None}
        return other

    def rotary(self, device: torch.device) -> LlamaRotaryEmbedding:
        if device not in self._rotaries:
            self._rotaries[device] = copy.deepcopy(self._rotaries[torch.device("cpu")]).to(device)
        return self._rotaries[device]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        if weight not in self.packs:
            return F.linear(x, weight, bias)
        out = self.packs[weight](x)
        return out if bias is None else out + bias

    def fuse(self, states: Tensor) -> Tensor:
        """The base's states side by side, [N, num_states * target size] -> [N, H]."""
        x = states.to(self.norm.dtype)
        if self.input_norm is not None:
            x = self._normed(x, self.input_norm)
        if len(self.state_norms):
            parts = x.unflatten(-1, (self.num_states, -1)).unbind(-2)
            x = torch.cat([self._normed(part, norm) for part, norm in zip(parts, self.state_norms, strict=True)], -1)
        return x if self.fc is None else self.product(x, self.fc, self.fc_bias)

    def forward(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend) -> Drafted:
        """One row a token.

        Args:
            embedded: [N, H], embeddings of the tokens.
            features: [N, H], of each token (`fuse`, or an earlier call's).
            positions: long [N], path positions of the tokens.
        """
        residual = self._run(embedded, features, positions, attend, len(self.layers))
        states = self._normed(residual, self.norm)
        return Drafted(states, states if self.norm_output else residual)

    def extend(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend, keep: Keep) -> None:
        """Keys and values of such rows and nothing else, as they are all that later rows see of them."""
        last = len(self.layers) - 1
        residual = self._run(embedded, features, positions, attend, last)
        _, k, v = self._heads(last, self._inputs(last, embedded, features, residual), features, positions)
        keep(last, k, v)

    def _run(self, embedded: Tensor, features: Tensor, positions: Tensor, attend: Attend, layers: int) -> Tensor:
        """[N, H] behind the first so many layers."""
        residual = self._normed(features, self.layers[0].hidden_norm) if self.norm_before_residual else features
        for index, layer in zip(range(layers), self.layers, strict=False):
            inputs = self._inputs(index, embedded, features, residual)
            attended = attend(index, *self._heads(index, inputs, features, positions))
            residual = residual + self.product(attended.flatten(1), layer.o_weight, layer.o_bias)
            x = self._normed(residual, layer.post_attention_layernorm)
            x = layer.activation(self.product(x, layer.gate)) * self.product(x, layer.up)
            residual = residual + self.product(x, layer.down)
        return residual

    def _inputs(self, index: int, embedded: Tensor, features: Tensor, residual: Tensor) -> Tensor:
        """What a layer's attention reads: in the first embeddings and features, else what came before."""
        layer = self.layers[index]
        if index:
            return self._normed(residual, layer.input_layernorm)
        inputs = self._normed(embedded.to(features.dtype), layer.input_layernorm)
        return torch.cat([inputs, self._normed(features, layer.hidden_norm)], dim=-1)

    def _heads(self, index: int, inputs: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, turned to their positions."""
        layer, shape = self.layers[index], (-1, self.config.head_dim)
        q, k, v = (
            self.product(inputs, getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_bias")).unflatten(-1, shape)
            for name in "qkv"
        )
        if layer.q_norm is not None:  # Qwen3's
            q = self._normed(q, layer.q_norm)
        if layer.k_norm is not None:
            k = self._normed(k, layer.k_norm)
        turned = self.rotary(features.device)(features, positions[None])
        q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], *turned, unsqueeze_dim=2))
        return q, k, v

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm in float32, as transformers' Llama computes it."""
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.config.rms_norm_eps).to(x.dtype)
        return weight * normed


class _Layer(nn.Module):
    """One layer's weights; None where the file has none."""

    def __init__(self, file: Eagle3File, index: int) -> None:
        super().__init__()
        for attribute, name in _NAMES.items():
            self.register_parameter(attribute, _fixed(file.layers[index].get(name)))
        self.activation = ACT2FN[file.config.hidden_act]

    def tensors(self) -> dict[str, Tensor]:
        """By the file's names."""
        found = ((name, getattr(self, attribute)) for attribute, name in _NAMES.items())
        return {name: weight.detach() for name, weight in found if weight is not None}


def _attribute(name: str) -> str:
    """What a layer calls a weight: "self_attn.q_proj.weight" is "q_weight", "mlp.down_proj.weight" is "down",
    "hidden_norm.weight" is "hidden_norm"."""
    group, _, rest = name.rpartition("_proj.")
    if not group:
        return name.removeprefix("self_attn.").removesuffix(".weight")
    word = group.rpartition(".")[2]
    return word if group.startswith("mlp.") else f"{word}_{rest}"


_NAMES = {_attribute(name): name for name in SHAPES}


def _fixed(tensor: Tensor | None) -> Any:
    """A parameter, or None where there is no tensor."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _plain(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()
