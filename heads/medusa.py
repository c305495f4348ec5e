"""Medusa heads: p_h = softmax(W_h (x + SiLU(A_h x + b_h))) (Cai et al. 2024, arXiv:2401.10774, section 3.1)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.models.families import unembedding_size
from medusa_apar.runtimes.devices import device_of

from . import checkpoints, vllm_layout
from .checkpoints import HeadTensors
from .draft_heads import DraftHeads, ResidualBlock, tree_tensors, zeros
from .drafters import KernelDrafter, TorchDrafter
from .layouts import Heads
from .weight_copies import DraftRows


class MedusaHeads(DraftHeads):
    """`num_heads` Medusa heads over the base's unembedding (V2) or one of their own each (V1).

    New heads are zero: each then proposes what the base would for its next token.
    """

    kind = "medusa"

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        own_unembedding: bool = False,
        token_map: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or num_layers < (0 if own_unembedding else 1):
            raise ValueError(f"{num_heads} Medusa heads of {num_layers} residual blocks would propose nothing new.")
        super().__init__(num_heads, num_layers, hidden_size, vocab_size, token_map)
        self.blocks = nn.ModuleList(ResidualBlock(num_heads, hidden_size, dtype) for _ in range(num_layers))
        self.unembedding: nn.Parameter | None = None
        if own_unembedding:
            self.unembedding = zeros(num_heads, self.draft_vocab_size, hidden_size, dtype=dtype)

    # ---- making, loading, saving

    @classmethod
    def random(
        cls, model: PreTrainedModel, num_heads: int = 3, num_layers: int = 1, seed: int = 0, layout: str = "v2"
    ) -> MedusaHeads:
        """Untrained heads in the model's dtype and device; the global random state is left alone."""
        if layout not in ("v1", "v2"):
            raise ValueError(f"layout is {layout!r}, must be 'v1' or 'v2'.")
        vocab_size, hidden_size = unembedding_size(model)
        heads = cls(num_heads, num_layers, hidden_size, vocab_size, own_unembedding=layout == "v1")
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad():
            for parameter in heads.blocks.parameters():
                parameter.normal_(std=0.02, generator=generator)
            if heads.unembedding is not None:
                heads.unembedding.copy_(model.get_output_embeddings().weight.expand_as(heads.unembedding))
        return heads.to(device_of(model), model.dtype).attach(model)

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], config: dict, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> MedusaHeads:
        """In any layout of `checkpoints`."""
        tensors = checkpoints.normalise(state)
        checkpoints.warn_if_config_lies(config, tensors)
        vocab_size = config.get("vocab_size") or unembedding_size(model)[0]
        if tensors.unembedding is not None and tensors.token_map is None:
            vocab_size = tensors.unembedding.shape[1]
        own = tensors.unembedding is not None
        heads = cls(tensors.num_heads, tensors.num_layers, tensors.hidden_size, vocab_size, own, tensors.token_map)
        heads.check_matches(model)
        state = {} if tensors.token_map is None else {"token_map": tensors.token_map}
        if tensors.unembedding is not None:
            state["unembedding"] = tensors.unembedding
        for layer in range(tensors.num_layers):
            state[f"blocks.{layer}.weight"], state[f"blocks.{layer}.bias"] = tensors.weight[layer], tensors.bias[layer]
        heads.load_state_dict(state)
        heads.acceptance = config.get("acceptance")
        return heads.to(device_of(model), dtype or model.dtype).attach(model)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """`medusa_lm_head.safetensors` (V2, or V1 where the heads own their unembedding) and `config.json`."""
        checkpoints.check_counts(self.num_heads, self.num_layers)
        config = {"version": "2" if self.unembedding is None else "1", **self._config()}
        checkpoints.write(Path(folder), checkpoints.state_dict(self.tensors()), config, dtype)

    def export_vllm(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """The folder that vLLM's Medusa reads: `--speculative-config '{"method": "medusa", "model": FOLDER, ...}'`.

        The base's unembedding is written along, and a truncated draft vocabulary is whole there: see `vllm_layout.py`.
        """
        checkpoints.check_counts(self.num_heads, self.num_layers)
        base = self._base[0]
        file = checkpoints.parse(checkpoints.state_dict(self.tensors()))
        whole = vllm_layout.with_whole_rows(file, base.get_output_embeddings().weight.detach().cpu())
        heads = Heads(whole, "vllm", Path(folder), str(base.name_or_path), unembedding_size(base)[0], has_bias=True)
        content = vllm_layout.state_dict(heads), vllm_layout.config(heads)
        checkpoints.write(heads.folder, *content, dtype, vllm_layout.FILE)

    def tensors(self) -> HeadTensors:
        """The weights on the CPU, in the form of `checkpoints`; those of blocks are copies."""
        shape = (self.num_layers, self.num_heads, self.hidden_size, self.hidden_size)
        weight = torch.empty(shape, dtype=self.dtype, device="cpu")
        bias = torch.empty(shape[:-1], dtype=self.dtype, device="cpu")
        for layer in range(self.num_layers):
            weight[layer] = self.get_parameter(f"blocks.{layer}.weight").detach()
            bias[layer] = self.get_parameter(f"blocks.{layer}.bias").detach()
        unembedding = None if self.unembedding is None else self.unembedding.detach().cpu()
        return HeadTensors(weight, bias, unembedding, None if self.token_map is None else self.token_map.cpu())

    # ---- drafting

    def hidden(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [heads, ..., H]: each head's residual blocks, no unembedding."""
        x = hidden_states.to(self.dtype).reshape(-1, self.hidden_size)
        for block in self.blocks:
            x = block(x)
        return x.expand(self.num_heads, -1, -1).view(self.num_heads, *hidden_states.shape)

    def states(self, hidden_states: Tensor, drafted: Tensor | None = None) -> Tensor:
        return self.hidden(hidden_states)

    def head_logits(self, states: Tensor) -> Tensor:
        return self.unembed(states) if self.unembedding is None else torch.bmm(states, self.unembedding.mT)

    @property
    def owns_unembedding(self) -> bool:
        return self.unembedding is not None

    def draft(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, drafter: TorchDrafter
    ) -> tuple[Tensor, Tensor]:
        states = self.hidden(hidden_states)[: tree.num_heads]  # heads below the tree are not asked
        if self.unembedding is None:
            found = drafter.likeliest(states, tree.top_k)
        else:
            found = drafter.top(torch.bmm(states, self.unembedding[: len(states)].mT), tree.top_k)
        return _at_nodes(tree, *found)

    def _kernel_drafter(self, rows: DraftRows | None) -> KernelDrafter:
        return MedusaKernelDrafter(self, rows)


class MedusaKernelDrafter(KernelDrafter):
    """Drafts with all Medusa heads in a few launches."""

    heads: MedusaHeads

    @torch.inference_mode()
    def propose(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        heads, count = self.heads, tree.num_heads
        own = heads.unembedding
        unembedding = self._unembedding if own is None else (own[:count], None)
        if unembedding is None or unembedding[0].dtype != heads.dtype or not self.serves(hidden_states, tree.top_k):
            return super().propose(hidden_states, root_ids, tree)
        from medusa_apar.triton_kernels.draft import medusa_draft

        weights, biases = ([block.get_parameter(n)[:count] for block in heads.blocks] for n in ("weight", "bias"))
        x = hidden_states.to(heads.dtype).contiguous()
        ids, log_probs = medusa_draft(x, weights, biases, *unembedding, heads.token_map, tree.top_k)
        return _at_nodes(tree, ids.long().transpose(0, 1), log_probs.transpose(0, 1))


def _at_nodes(tree: DraftTree, token_ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Picks a tree's nodes, [T, n], from each head's likeliest, [heads, T, top_k]."""
    places = tree_tensors(tree, token_ids.device)
    return token_ids[places.depths, :, places.ranks].T, log_probs[places.depths, :, places.ranks].T
