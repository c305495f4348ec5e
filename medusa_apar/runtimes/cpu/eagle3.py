"""Drafting with an EAGLE-3 drafter in one call of compiled code: see `eagle3.h`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import NewRows, Written
from medusa_apar.kv.pool import KVPool
from medusa_apar.models.families import base_logit_scale

from . import library
from .drafting import packed_tree
from .library import address, floats
from .weights import KINDS, PANEL, PackedMatrix, interleaved

_HEAD = 32  # what a head's size has to be a multiple of, so that halves of it are whole vectors
_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on how long a text is


class CompiledEagle3:
    """A drafter as `heads/eagle3/layer.py` has it, packed as `kind`.

    heads: whose network it is, float32 or bfloat16. unembedding: [draft vocabulary, H].
    """

    def __init__(self, heads: Any, unembedding: Tensor, kind: str) -> None:
        network, config = heads.network, heads.network.config
        table = heads.base.get_input_embeddings().weight if network.embedding is None else network.embedding
        self._table, self._clamps = table.detach(), network.embedding is not None
        self._hidden, self._rotary = network.hidden_size, network.rotary(torch.device("cpu"))
        self._token_map = None if heads.token_map is None else heads.token_map.to("cpu", torch.long).contiguous()
        self._unembedding = PackedMatrix(unembedding, kind)
        self._norm, self._layers = _vector(network.norm), [_PackedLayer(layer, kind) for layer in network.layers]
        self._hidden_norm = _vector(network.layers[0].hidden_norm)
        self._heads = library.Heads(
            *(config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.head_dim**-0.5, 0.0),
        )
        self._array = (library.Layer * len(self._layers))(*(layer.struct for layer in self._layers))
        model = library.Model(
            *(len(self._layers), self._hidden, config.intermediate_size, len(self._table)),
            *(KINDS[str(self._table.dtype).removeprefix("torch.")], config.head_dim, 0, 0, self._heads),
            *(config.rms_norm_eps, 1.0, 1.0, float(base_logit_scale(torch.ones(1), heads.base)), 0.0),
            address(self._norm, torch.float32, self._hidden),
            address(self._table, self._table.dtype, len(self._table) * self._hidden),
            *(self._array, self._unembedding.struct),
        )
        self.writes = len(self._layers) == 1
        self._fc = None if network.fc is None else PackedMatrix(network.fc.detach(), kind, _floats(network.fc_bias))
        norms = torch.cat([_vector(norm) for norm in network.state_norms]) if len(network.state_norms) else None
        self._norms, self._width = (_floats(network.input_norm), norms), network.num_states * network.input_size
        self._struct = library.Eagle3(
            *(model, address(self._hidden_norm, torch.float32, self._hidden)),
            None if self._token_map is None else address(self._token_map, torch.long, len(self._token_map)),
            *(len(unembedding), network.norm_before_residual, network.norm_output),
            *(network.num_states, network.input_size),
            library.Matrix() if self._fc is None else self._fc.struct,
            *(None if norm is None else address(norm, torch.float32, self._width) for norm in self._norms),
        )
        self._tables: tuple[Tensor, Tensor] = floats(0, config.head_dim), floats(0, config.head_dim)
        self._trees: weakref.WeakKeyDictionary[DraftTree, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()

    def propose(
        self, written: Written, root_ids: Tensor, tree: DraftTree, min_probability: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttendingDrafter.propose_behind`; below nodes that are less likely the token is -1."""
        count, nodes, hidden = len(root_ids), len(tree), self._hidden
        made = self._trees.get(tree)
        if made is None:
            made = self._trees[tree] = packed_tree(tree)
        lengths = [len(path) for path in written.paths]
        slots = torch.cat([torch.from_numpy(path[1:]) for path in written.paths]).to(torch.int32)
        starts = torch.tensor([0, *lengths]).sub_(1).clamp_(min=0).cumsum(0).to(torch.int32)
        last = torch.tensor([int(path[-1]) for path in written.paths])
        features = written.pool.features_at(last).float().contiguous()
        pools = self._pools(written)
        cos, sin = self._turns(max(lengths) + len(tree.levels) + 1)
        roots = self._known(root_ids)
        least = math.log(min_probability) if min_probability > 0 else -math.inf
        token_ids, log_probs = torch.empty(count, nodes, dtype=torch.long, device="cpu"), floats(count, nodes)
        if library.library().mapar_eagle3(
            *(self._struct, made[0]),
            library.Written(
                address(slots, torch.int32, len(slots)),
                address(starts, torch.int32, count + 1),
                pools,
                address(features, torch.float32, count * hidden),
                *(address(each, torch.float32, each.numel()) for each in (cos, sin)),
            ),
            *(address(roots, torch.long, count), count, least),
            *(address(token_ids, torch.long, count * nodes), address(log_probs, torch.float32, count * nodes)),
            torch.get_num_threads(),
        ):
            raise IndexError(f"a token is not one of the model's {len(self._table)}")
        return token_ids, log_probs

    def write(self, states: Tensor, rows: NewRows, pool: KVPool, first: int) -> bool:
        """As `DraftLayers.write`."""
        if not self.writes:
            return False
        count, heads, device = len(states), self._heads, torch.device("cpu")
        width = heads.kv_heads * heads.head_dim
        states, tokens = states.float().contiguous(), self._known(rows.token_ids)
        features = pool.features(self._hidden, torch.float32, device)
        stores = pool.layer(first, heads.kv_heads, heads.head_dim, torch.float32, device)
        cos, sin = self._turns(int(rows.positions.max()) + 1)
        held = [each.contiguous() for each in (tokens, rows.positions, rows.slots, rows.parents)]
        if library.library().mapar_eagle3_rows(
            self._struct,
            library.NewRows(
                *(count, address(states, torch.float32, count * self._width)),
                *(address(each, torch.long, count) for each in held),
                address(features, torch.float32, pool.capacity * self._hidden),
                library.Pool(*(address(store, torch.float32, pool.capacity * width) for store in stores), None),
                *(address(each, torch.float32, each.numel()) for each in (cos, sin)),
            ),
            torch.get_num_threads(),
        ):
            raise IndexError(f"a token is not one of the model's {len(self._table)}")
        return True

    def _known(self, token_ids: Tensor) -> Tensor:
        """A drafter's own embedding may lack rows of new tokens: any row does, since these are never drafted."""
        return token_ids.clamp(max=len(self._table) - 1) if self._clamps else token_ids.contiguous()

    def _pools(self, written: Written) -> Any:
        """Where the pool keeps the layers' keys and values, which stay there as long as it does."""
        pool, first = written.pool, written.pool.storage.first_draft_layer
        assert first is not None
        size = pool.capacity * self._heads.kv_heads * self._heads.head_dim
        return (library.Pool * len(self._layers))(
            *(
                library.Pool(*(address(store[layer], torch.float32, size) for store in (pool.keys, pool.values)), None)
                for layer in range(first, first + len(self._layers))
            )
        )

    def _turns(self, needed: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [positions, head_dim] of at least so many positions."""
        tables = self._tables
        if len(tables[0]) < needed:
            positions = torch.arange(1 << max(needed - 1, 255).bit_length(), device="cpu")
            made = self._rotary(floats(0), positions[None])
            tables = self._tables = made[0][0].float().contiguous(), made[1][0].float().contiguous()
        return tables


class _PackedLayer:
    """One layer's weights, and the struct that points to them."""

    def __init__(self, layer: Any, kind: str) -> None:
        qkv = torch.cat([layer.q_weight, layer.k_weight, layer.v_weight]).detach()
        biases = [layer.q_bias, layer.k_bias, layer.v_bias]
        names = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
        self.norms = [None if getattr(layer, name) is None else _vector(getattr(layer, name)) for name in names]
        self.matrices = [
            PackedMatrix(
                qkv, kind, _joined(biases, [len(w) for w in (layer.q_weight, layer.k_weight, layer.v_weight)])
            ),
            PackedMatrix(layer.o_weight.detach(), kind, None if layer.o_bias is None else layer.o_bias.detach()),
            PackedMatrix(interleaved(layer.gate.detach(), layer.up.detach()), kind),
            PackedMatrix(layer.down.detach(), kind),
        ]
        before, behind, query, key = (
            None if norm is None else address(norm, torch.float32, len(norm)) for norm in self.norms
        )
        matrices = (matrix.struct for matrix in self.matrices)
        # Its pool is the draft's own; it sees the whole path, keeps no states, and turns by the only table.
        self.struct = library.Layer(
            *(before, None, behind, None, query, key), *matrices, None, None, None, 0, -1, -1, 0
        )


def compilable(heads: Any, unembedding: Tensor) -> bool:
    """Whether a drafter of these sizes, on such a base, can be compiled."""
    network, embedding = heads.network, heads.base.get_input_embeddings()
    config = network.config
    table = embedding.weight if network.embedding is None else network.embedding
    if network.embedding is None and type(embedding) is not nn.Embedding:  # others may do more than look up
        return False
    if getattr(heads.base.config.get_text_config(), "final_logit_softcapping", None):
        return False
    if table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
        return False
    drafted = len(unembedding) if heads.token_map is None else 1 + int(heads.token_map.max())
    if drafted > len(table) or len(unembedding) != heads.draft_vocab_size:
        return False
    if not all(isinstance(layer.activation, (nn.SiLU, SiLUActivation)) for layer in network.layers):
        return False
    sizes = network.hidden_size, network.input_size, config.intermediate_size
    scaled = config.rope_parameters.get("rope_type", "default") in _ROPES
    return scaled and config.head_dim % _HEAD == 0 and all(size % PANEL == 0 for size in sizes)


def _floats(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else _vector(weight)


def _vector(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    parts = zip(biases, sizes, strict=True)
    return torch.cat([floats(size).zero_() if bias is None else bias.detach().float() for bias, size in parts])
