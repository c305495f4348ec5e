"""Hydra heads (Ankner et al. 2024, arXiv 2402.05109): head h also sees the tokens drafted before it.

Head h (0-based) reads the base's hidden state x, from which the base chose token t+1, and the embeddings e of tokens
t+1 to t+1+h (the root and the tokens drafted below it), and predicts token t+2+h:

    y = S_h x + sum_j E_hj norm(e_(t+1+j)) + b_h,    then residual blocks y + SiLU(A y + c),    then the unembedding.

The first layer is a sum, so the draft nodes of a level share what they have in common: x is multiplied once, and a
token once for all heads below it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.models.families import unembedding_size
from medusa_apar.runtimes.cpu.drafting import CompiledHydra, compilable
from medusa_apar.runtimes.cpu.weight_fingerprint import plain
from medusa_apar.runtimes.devices import device_of

from . import checkpoints
from .draft_heads import DraftHeads, ResidualBlock, tree_tensors, zeros
from .drafters import TorchDrafter


class HydraHeads(DraftHeads):
    """Sequentially dependent heads over the base's unembedding; `sequential=False`: Medusa heads that read aux layers.

    New heads pass the final state on: each then proposes what the base would for its next token. Embeddings are
    scaled to a mean square of 1 a token: a final norm's output is tens of times larger than they are.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        token_map: Tensor | None = None,
        aux_layers: tuple[int, ...] = (),
        sequential: bool = True,
    ) -> None:
        if num_heads < 1:
            raise ValueError(f"{num_heads} heads would propose nothing.")
        super().__init__(num_heads, num_layers, hidden_size, vocab_size, token_map, aux_layers)
        self.sequential = sequential
        self.kind = "hydra" if sequential else "fused"
        self.from_states = zeros(num_heads, hidden_size, self.input_size)
        with torch.no_grad():
            self.from_states.diagonal(dim1=1, dim2=2).fill_(1)
        # Entry j: what token t+1+j adds to heads j and on.
        self.from_token = nn.ParameterList(
            zeros(num_heads - token, hidden_size, hidden_size) for token in range(num_heads if sequential else 0)
        )
        self.bias = zeros(num_heads, hidden_size)
        self.blocks = nn.ModuleList(ResidualBlock(num_heads, hidden_size) for _ in range(num_layers))

    # ---- making, loading, saving

    @classmethod
    def random(
        cls,
        model: PreTrainedModel,
        num_heads: int = 3,
        num_layers: int = 1,
        seed: int = 0,
        aux_layers: tuple[int, ...] = (),
        sequential: bool = True,
    ) -> HydraHeads:
        """Untrained heads in the model's dtype and device; the global random state is left alone."""
        vocab_size, hidden_size = unembedding_size(model)
        heads = cls(num_heads, num_layers, hidden_size, vocab_size, None, aux_layers, sequential)
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
        return heads.to(device_of(model), model.dtype).attach(model)

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], config: dict, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> HydraHeads:
        """Counts come from the tensors, not from the config."""
        state = dict(state)
        if "from_states" not in state:
            raise ValueError("these are no Hydra heads: the file lacks the key 'from_states'.")
        for key, tensor in state.items():
            checkpoints.check_dense(key, tensor)
        for key, dimensions in (("from_states", 3), ("aux_layers", 1)):
            if key in state and state[key].dim() != dimensions:
                raise ValueError(f"the heads' file is damaged: {key!r} has the shape {list(state[key].shape)}.")
        num_heads, hidden_size, _ = state["from_states"].shape
        num_layers = sum(key.startswith("blocks.") and key.endswith(".weight") for key in state)
        checkpoints.check_counts(num_heads, num_layers)
        aux_layers = tuple(state.pop("aux_layers").tolist()) if "aux_layers" in state else ()
        vocab_size = config.get("vocab_size") or unembedding_size(model)[0]
        sequential = "from_token.0" in state
        heads = cls(num_heads, num_layers, hidden_size, vocab_size, state.get("token_map"), aux_layers, sequential)
        heads.check_matches(model)
        try:
            heads.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the heads' file is damaged: {' '.join(str(error).split())}") from error
        heads.acceptance = config.get("acceptance")
        return heads.to(device_of(model), dtype or model.dtype).attach(model)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """`medusa_lm_head.safetensors` with keys of its own and a `config.json` with `"kind": "hydra"`."""
        checkpoints.check_counts(self.num_heads, len(self.blocks))
        state = {key: value.detach() for key, value in self.state_dict().items()}
        if self.aux_layers:
            state["aux_layers"] = torch.tensor(self.aux_layers, dtype=torch.long, device="cpu")
        config = {"kind": self.kind, **self._config(), "aux_layers": list(self.aux_layers)}
        checkpoints.write(Path(folder), state, config, dtype)

    # ---- the network

    def embed(self, token_ids: Tensor) -> Tensor:
        """[...] -> [..., H]: the base's input embeddings at unit scale; they are not trained."""
        with torch.no_grad():
            embedded = self.base.get_input_embeddings()(token_ids).detach()
            return F.rms_norm(embedded.float(), (self.hidden_size,)).to(self.dtype)

    def _state_sums(self, hidden_states: Tensor, heads: int) -> Tensor:
        """[T, input_size] -> [T, heads, H], the first so many heads' share of the states."""
        weight, bias = self.from_states[:heads].flatten(0, 1), self.bias[:heads].flatten()
        return F.linear(hidden_states.to(self.dtype), weight, bias).view(-1, heads, self.hidden_size)

    def _token_sums(self, token: int, embedded: Tensor, heads: int) -> Tensor:
        """[..., H] of tokens t+1+`token` -> [..., heads - token, H], their share in heads `token` and on."""
        weight = self.from_token[token][: heads - token]
        sums: Tensor = F.linear(embedded, weight.flatten(0, 1)).unflatten(-1, (heads - token, self.hidden_size))
        return sums

    def states(self, hidden_states: Tensor, drafted: Tensor | None = None) -> Tensor:
        sums = list(self._state_sums(hidden_states, self.num_heads).unbind(1))
        if self.sequential:
            if drafted is None:
                raise ValueError("Hydra heads need the tokens drafted before them.")
            for token in range(self.num_heads):
                shares = self._token_sums(token, self.embed(drafted[:, token]), self.num_heads)
                for head in range(token, self.num_heads):
                    sums[head] = sums[head] + shares[:, head - token]
        x = torch.stack(sums)
        for block in self.blocks:
            x = block(x)
        return x

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter:
        if packing is not None:
            kind, make = ("compiled", packing), partial(self._compiled, packing)
            compiled = self._copies.get(kind, self._weights_read(), make, bits=True)
            if compiled is not None:
                return compiled
        return super().drafter(packing, kernels)

    def _compiled(self, packing: str) -> CompiledHydra | None:
        """These heads in compiled code; None where they do not draft for it."""
        unembedding = self.plain_unembedding(bits=True)
        if unembedding is None or not compilable(self, unembedding):
            return None
        return CompiledHydra(self, unembedding, packing)

    def _weights_read(self) -> list[Tensor]:
        """All that drafting reads, tied ones once."""
        ends = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        weights = [*self.parameters(), *self.buffers(), *(weight for end in ends for weight in end.parameters())]
        return list({id(weight): weight for weight in weights if plain(weight)}.values())

    def draft(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, drafter: TorchDrafter
    ) -> tuple[Tensor, Tensor]:
        threads, heads = len(hidden_states), tree.num_heads
        token_ids = root_ids.new_zeros(threads, len(tree))
        log_probs = torch.zeros(threads, len(tree), dtype=torch.float32, device=root_ids.device)
        sums = self._state_sums(hidden_states, heads)[:, None]  # [threads, parents, heads from this depth on, H]
        drafted = root_ids[:, None]  # [threads, parents]
        levels = tree_tensors(tree, root_ids.device).levels
        for depth, level in enumerate(levels):
            if self.sequential:
                sums = sums + self._token_sums(depth, self.embed(drafted), heads)
            x = sums[:, :, 0]
            for block in self.blocks:
                x = cast(ResidualBlock, block).of(depth, x)
            ids, chances = drafter.likeliest(x, tree.levels[depth].top_k)
            drafted = ids[:, level.parents, level.ranks]
            token_ids[:, level.nodes], log_probs[:, level.nodes] = drafted, chances[:, level.parents, level.ranks]
            drafted, sums = drafted[:, level.inner], sums[:, level.inner_parents, 1:]
        return token_ids, log_probs
