"""EAGLE-3 checkpoints as they are found in the wild, read into one normal form.

    SafeAILab, SpecForge, NVIDIA   midlayer.*, fc, norm, lm_head, d2t, t2d, maybe embed_tokens
    speculators (Red Hat)          layers.{l}.*, the same beside it, `transformer_layer_config` in the config
    vLLM's names                   any of them behind `model.`, `draft_id_to_target_id` for d2t

What a tensor can tell is taken from it: how many layers there are, how many states of the base are fused, the sizes,
which norms there are. A config is believed where no tensor tells: heads, rope, epsilon, which states are fused.

A drafter fuses states of the base at *boundaries*: boundary b lies between b layers and the rest, so that 0 is the
embedding and n the last layer's output before the final norm. Configs name boundaries, or the layer before each
(`Boundaries`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig

from medusa_apar.reading import MAX_LAYERS

PREFIX = re.compile(r"^(?:draft_)?model\.")
LAYER = re.compile(r"layers\.(?P<layer>\d{1,4})\.(?P<name>.+)")
RENAMED = {"draft_id_to_target_id": "d2t", "target_id_to_draft_id": "t2d"}
IGNORED = ("rotary_emb.inv_freq", "mask_hidden", "verifier_lm_head", "verifier_norm")  # nothing that drafting reads

# What a layer may hold. Its sizes: H is the drafter's width, I the input's (2H in the first layer), Q and K those of
# all heads' queries and keys, D of one head, F of the feed-forward layer.
SHAPES = {
    "hidden_norm.weight": "H",
    "input_layernorm.weight": "H",
    "post_attention_layernorm.weight": "H",
    "self_attn.q_proj.weight": "QI",
    "self_attn.k_proj.weight": "KI",
    "self_attn.v_proj.weight": "KI",
    "self_attn.o_proj.weight": "HQ",
    "self_attn.q_proj.bias": "Q",
    "self_attn.k_proj.bias": "K",
    "self_attn.v_proj.bias": "K",
    "self_attn.o_proj.bias": "H",
    "self_attn.q_norm.weight": "D",
    "self_attn.k_norm.weight": "D",
    "mlp.gate_proj.weight": "FH",
    "mlp.up_proj.weight": "FH",
    "mlp.down_proj.weight": "HF",
}
OPTIONAL = ("hidden_norm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight")  # and biases

OWN_BOUNDARIES = "boundaries"  # entry of a config that we have written
Boundaries = Literal["before", "after"]  # what a config's layer id names: the boundary before that layer, or after it


@dataclass(slots=True)
class Eagle3File:
    """A drafter in no layout.

    layers: of each layer its tensors, by the names in `SHAPES`. fc: [H, states * target size], None where the drafter
        reads a state as it is. state_norms: [target size] for each fused state, or empty. input_norm: [states * target
        size] over all of them. embedding: [vocabulary, H], None where the base's serves. unembedding: [draft
        vocabulary, H], None where the base's serves.
    token_map: long [draft vocabulary], vocabulary ids; None: the whole vocabulary.
    boundaries: of the base, from which the fused states come; None: nothing says so.
    config: heads, rope, epsilon and activation, as transformers' Llama has them.
    norm_before_residual: the first layer's residual starts behind `hidden_norm`. norm_output: the next step reads the
        state behind the final norm.
    """

    layers: list[dict[str, Tensor]]
    norm: Tensor
    config: LlamaConfig
    fc: Tensor | None = None
    fc_bias: Tensor | None = None
    input_norm: Tensor | None = None
    state_norms: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None
    unembedding: Tensor | None = None
    token_map: Tensor | None = None
    boundaries: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_output: bool = False

    @property
    def hidden_size(self) -> int:
        return self.norm.numel()

    @property
    def num_states(self) -> int:
        """How many states of the base are fused."""
        if self.fc is None:
            return 1
        return len(self.state_norms) or self.fc.shape[1] // (_target_size(self.config) or self.hidden_size)

    @property
    def draft_vocab_size(self) -> int:
        return self.config.vocab_size if self.token_map is None else len(self.token_map)


def parse(state: Mapping[str, Tensor], config: Mapping[str, Any], convention: Boundaries | None = None) -> Eagle3File:
    """A checkpoint's tensors and config in the normal form.

    convention: what the config's layer ids name; None goes by the first of them, as SGLang does: 1 is the layer after
        which the state is taken, since no drafter fuses what lies before layer 1 (sgl-project/sglang#25454).

    ValueError: this is no EAGLE-3 drafter, or a damaged one.
    """
    top = _normal_names(state)
    layers = _layers(top)
    norm = top.pop("norm.weight", None)
    if norm is None or norm.dim() != 1:
        raise ValueError("the drafter lacks its final norm (norm.weight).")
    hidden = norm.numel()
    inner = _inner_config(config)
    llama = _llama_config(config, inner, hidden, layers, top)
    for index, layer in enumerate(layers):
        _check_layer(layer, index, llama)
    fc, fc_bias = top.pop("fc.weight", None), top.pop("fc.bias", None)
    if fc is not None and (fc.dim() != 2 or len(fc) != hidden):
        raise ValueError(f"fc.weight has shape {list(fc.shape)}, but the drafter is {hidden} wide.")
    target = _target_size(llama) or hidden
    if fc is not None and fc.shape[1] % target:
        raise ValueError(f"fc.weight reads {fc.shape[1]} numbers, which are no whole states of {target}.")
    norms = sorted((key for key in top if key.startswith("fc_norm.")), key=lambda key: int(key.split(".")[1]))
    file = Eagle3File(
        layers=layers,
        norm=norm,
        config=llama,
        fc=fc,
        fc_bias=fc_bias,
        input_norm=top.pop("input_norm.weight", None),
        state_norms=[top.pop(key) for key in norms],
        embedding=top.pop("embed_tokens.weight", None),
        unembedding=top.pop("lm_head.weight", None),
        token_map=_token_map(top.pop("d2t", None), top.pop("t2d", None), llama.vocab_size),
        norm_before_residual=bool(_option(config, inner, "norm_before_residual", "speculators_model_type" in config)),
        norm_output=bool(_option(config, inner, "norm_output", False)),
    )
    if top:
        raise ValueError(f"not an EAGLE-3 drafter that can be run: it holds the key {next(iter(top))!r}.")
    _check_ends(file)
    file.boundaries = _boundaries(config, inner, file.num_states, convention)
    return file


def default_boundaries(num_layers: int) -> tuple[int, ...]:
    """The three that EAGLE-3's authors fuse where no config says otherwise: low, middle and high."""
    return 2, num_layers // 2, num_layers - 3


def ascending_boundaries(num_layers: int) -> tuple[int, ...]:
    """A drafter of our own fuses a low state, a middle one, and the last layer's output, from which the base says what
    comes next; a base of one or two layers has fewer."""
    low = 2 if num_layers >= 6 else 1
    return tuple(sorted({low, max(num_layers // 2, low + 1), num_layers} & set(range(1, num_layers + 1))))


# ---- the parts


def _normal_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes and with one name for each tensor; what drafting does not read is left out."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = PREFIX.sub("", key).replace("midlayer.", "layers.0.")
        name = RENAMED.get(name, name)
        if any(word in name for word in IGNORED):
            continue
        if name in found:
            raise ValueError(f"the drafter's file names {name!r} twice, once as {key!r}.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError(f"{key!r} in the drafter's file is no dense tensor.")
        whole_numbers = name in ("d2t", "t2d")
        if whole_numbers == tensor.is_floating_point():
            raise ValueError(f"{key!r} in the drafter's file is of {tensor.dtype}.")
        if not whole_numbers and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key!r} in the drafter's file holds numbers that are not finite.")
        found[name] = tensor
    return found


def _layers(top: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The layers' tensors, taken out of `top`."""
    found: dict[int, dict[str, Tensor]] = {}
    for key in list(top):
        if match := LAYER.fullmatch(key):
            found.setdefault(int(match["layer"]), {})[match["name"]] = top.pop(key)
    if not found:
        raise ValueError("not an EAGLE-3 drafter: it has no layer (midlayer.* or layers.0.*).")
    if sorted(found) != list(range(len(found))) or len(found) > MAX_LAYERS:
        raise ValueError(
            f"the drafter's layers are numbered {sorted(found)[:MAX_LAYERS]}, must be from 0 without gaps, "
            f"at most {MAX_LAYERS}."
        )
    return [found[index] for index in range(len(found))]


def _inner_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a config keeps the sizes of the layers: speculators' has a folder of its own for them."""
    inner = config.get("transformer_layer_config")
    return inner if isinstance(inner, Mapping) else config


def _option(config: Mapping[str, Any], inner: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """An entry at the top, under `eagle_config` or beside the layers' sizes."""
    for place in (config, config.get("eagle_config"), inner):
        if isinstance(place, Mapping) and place.get(name) is not None:
            return place[name]
    return otherwise


def _llama_config(
    config: Mapping[str, Any],
    inner: Mapping[str, Any],
    hidden: int,
    layers: Sequence[Mapping[str, Tensor]],
    top: Mapping[str, Tensor],
) -> LlamaConfig:
    """What no tensor tells, checked against what the tensors do tell."""
    first = layers[0]
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.gate_proj.weight"):
        if name not in first:
            raise ValueError(f"the drafter's first layer lacks {name}.")
    queries, keys = len(first["self_attn.q_proj.weight"]), len(first["self_attn.k_proj.weight"])
    heads = inner.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"the drafter's config says num_attention_heads is {heads!r}, and no tensor tells.")
    head_dim = inner.get("head_dim") or queries // heads
    if heads * head_dim != queries or not head_dim or keys % head_dim or heads % max(keys // head_dim, 1):
        raise ValueError(
            f"{heads} heads of {head_dim} do not fit queries of {queries} and keys of {keys} in the drafter's file."
        )
    vocabulary = inner.get("vocab_size") or len(top.get("t2d", ())) or len(top.get("embed_tokens.weight", ()))
    if not vocabulary:
        raise ValueError("neither config nor tensors say how large the drafter's vocabulary is.")
    names = ("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "max_position_embeddings")
    known: dict[str, Any] = {name: inner[name] for name in names if inner.get(name) is not None}
    known["target_hidden_size"] = _option(config, inner, "target_hidden_size", None)
    return LlamaConfig(
        **known,
        hidden_size=hidden,
        intermediate_size=len(first["mlp.gate_proj.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=keys // head_dim,
        head_dim=head_dim,
        vocab_size=vocabulary,
    )


def _target_size(config: LlamaConfig) -> int | None:
    return getattr(config, "target_hidden_size", None)


def _check_layer(layer: Mapping[str, Tensor], index: int, config: Any) -> None:
    """ValueError for a tensor that is missing, unknown or of another size."""
    hidden = config.hidden_size
    sizes = {
        "H": hidden,
        "I": hidden if index else 2 * hidden,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "D": config.head_dim,
        "F": config.intermediate_size,
    }
    for name, shape in SHAPES.items():
        wanted = [sizes[letter] for letter in shape]
        if name not in layer:
            if name.endswith(".bias") or (name in OPTIONAL and (index or name != "hidden_norm.weight")):
                continue
            raise ValueError(f"layer {index} of the drafter lacks {name}.")
        if list(layer[name].shape) != wanted:
            raise ValueError(
                f"{name} of the drafter's layer {index} has shape {list(layer[name].shape)}, not {wanted}."
            )
    if unknown := sorted(set(layer) - set(SHAPES)):
        raise ValueError(f"layer {index} of the drafter holds {unknown[0]}, which no EAGLE-3 drafter has.")


def _check_ends(file: Eagle3File) -> None:
    """ValueError unless norms, embedding and unembedding fit what lies between them."""
    hidden, vocabulary = file.hidden_size, file.config.vocab_size
    ends = (("embed_tokens", file.embedding, vocabulary), ("lm_head", file.unembedding, file.draft_vocab_size))
    for name, tensor, rows in ends:
        if tensor is not None and list(tensor.shape) != [rows, hidden]:
            raise ValueError(f"{name}.weight of the drafter has shape {list(tensor.shape)}, not {[rows, hidden]}.")
    wide = hidden if file.fc is None else file.fc.shape[1]
    if file.input_norm is not None and list(file.input_norm.shape) != [wide]:
        raise ValueError(f"input_norm.weight of the drafter has shape {list(file.input_norm.shape)}, not {[wide]}.")
    if file.fc_bias is not None and list(file.fc_bias.shape) != [hidden]:
        raise ValueError(f"fc.bias of the drafter has shape {list(file.fc_bias.shape)}, not {[hidden]}.")
    each = wide // file.num_states
    if any(list(norm.shape) != [each] for norm in file.state_norms) or each * file.num_states != wide:
        raise ValueError(f"{file.num_states} norms of states do not fit an fc.weight that reads {wide} numbers.")


def _token_map(d2t: Tensor | None, t2d: Tensor | None, vocabulary: int) -> Tensor | None:
    """Vocabulary ids of the draft vocabulary. d2t holds what is to be added to an id's place, or the ids themselves."""
    if d2t is None:
        return None
    places = torch.arange(d2t.numel())
    if d2t.dim() != 1 or not len(d2t):
        raise ValueError(f"d2t of the drafter has shape {list(d2t.shape)}, must be a list of ids.")
    offsets = places + d2t.long()

    def fits(ids: Tensor) -> bool:
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) < len(ids):
            return False
        if t2d is None or t2d.dtype != torch.bool or list(t2d.shape) != [vocabulary]:
            return True
        return bool(t2d[ids].all())

    for ids in (offsets, d2t.long()):
        if fits(ids):
            return ids
    raise ValueError(f"d2t of the drafter names no {len(d2t)} different ids of {vocabulary}.")


def _boundaries(
    config: Mapping[str, Any], inner: Mapping[str, Any], states: int, convention: Boundaries | None
) -> tuple[int, ...] | None:
    """The boundaries that the config names; ValueError where the tensors fuse another number of states."""
    if (own := config.get(OWN_BOUNDARIES)) is not None and convention is None:  # which needs no convention
        ids, convention = own, "before"
    elif (ids := _option(config, inner, "eagle_aux_hidden_state_layer_ids", None)) is None:
        return None
    if not isinstance(ids, list) or not all(type(layer) is int and layer >= 0 for layer in ids):
        raise ValueError(f"eagle_aux_hidden_state_layer_ids is {ids!r}, must be a list of layers.")
    if len(ids) != states:
        raise ValueError(f"the config names {len(ids)} states of the base ({ids}), but fc.weight fuses {states}.")
    after = convention == "after" if convention is not None else ids[0] == 1
    return tuple(layer + after for layer in ids)


def files_of(path: Path) -> list[Path]:
    """The weight files of a drafter's folder, safetensors or else a pickle of tensors; a file is its own.
    FileNotFoundError: there are none."""
    if path.is_file():
        return [path]
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"):
        if found := sorted(path.glob(pattern)):
            return found
    raise FileNotFoundError(f"no drafter in {path}: neither model.safetensors nor pytorch_model.bin is there.")
