"""What a decoder layer is to the compiled step, and where each family of transformers keeps the parts of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class Family:
    """How the decoder of a family differs from Llama's. Its classes' names begin with `name`.

    norms: names of the norms before attention, behind it, before the MLP and behind it, "" where there is none.
    path_norms: queries and keys are normalised: each head's, or all heads' at once, as the norms' size says.
    fused: queries, keys and values are one projection, and so are gate and up.
    centred: norms multiply by 1 + weight.
    windows: layers that see `config.sliding_window` positions: "", "all", or "some", as `config.layer_types` says.
    caps_scores, caps_logits, divides_logits: whether the forward pass heeds what the config says of that.
    """

    name: str
    decoder: str = "Model"
    embedding: str = "Embedding"
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    path_norms: bool = False
    fused: bool = False
    centred: bool = False
    windows: str = ""
    caps_scores: bool = False
    caps_logits: bool = False
    divides_logits: bool = False
    activation: str = "act_fn"

    @property
    def home(self) -> str:
        """The module of transformers that defines it."""
        return f"transformers.models.{self.name.lower()}.modeling_{self.name.lower()}"


_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    family.name: family
    for family in (
        *(Family("Llama"), Family("Granite", divides_logits=True), Family("Mistral", windows="all")),
        *(Family("Qwen2", windows="some"), Family("SmolLM3", windows="some")),
        Family("Qwen3", path_norms=True, windows="some"),
        Family("Olmo2", norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"), path_norms=True),
        Family("Phi3", fused=True, windows="all", activation="activation_fn"),
        Family(
            *("Gemma2", "Model", "Gemma2TextScaledWordEmbedding"),
            norms=_AROUND,
            centred=True,
            windows="some",
            caps_scores=True,
            caps_logits=True,
        ),
        Family(
            *("Gemma3", "TextModel", "Gemma3TextScaledWordEmbedding"),
            norms=_AROUND,
            path_norms=True,
            centred=True,
            windows="some",
            caps_logits=True,
        ),
    )
}
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu"}  # by class


def family_of(model: nn.Module) -> Family | None:
    """The family whose causal language model this is, by the name and the home of its class."""
    family = FAMILIES.get(type(model).__name__.removesuffix("ForCausalLM"))
    return family if family is not None and type(model).__module__ == family.home else None


class LayerParts(NamedTuple):
    """A layer's modules. Of a fused family `qkv` and `gate_up` are one linear layer each, else three and two."""

    layer: Any
    attention: Any
    mlp: Any
    activation: Any
    norms: tuple[Any, Any, Any, Any]  # before attention, behind it, before the MLP, behind it; None where there is none
    path_norms: tuple[Any, ...]  # of queries and of keys, or none
    qkv: tuple[Any, ...]
    output: Any
    gate_up: tuple[Any, ...]
    down: Any
    dropouts: tuple[Any, ...]  # behind attention and MLP

    @property
    def linears(self) -> tuple[Any, ...]:
        return (*self.qkv, self.output, *self.gate_up, self.down)

    @property
    def all_norms(self) -> tuple[Any, ...]:
        return (*(norm for norm in self.norms if norm is not None), *self.path_norms)


def parts_of(layer: Any, family: Family) -> LayerParts:
    """By way of `_modules`, since this is asked in every call. KeyError where a part is missing."""
    own = layer._modules
    attention, mlp = own["self_attn"], own["mlp"]
    of_attention, of_mlp = attention._modules, mlp._modules
    before, behind, before_mlp, behind_mlp = (own[name] if name else None for name in family.norms)
    return LayerParts(
        *(layer, attention, mlp, of_mlp[family.activation]),
        (before, behind, before_mlp, behind_mlp),
        (of_attention["q_norm"], of_attention["k_norm"]) if family.path_norms else (),
        tuple(of_attention[name] for name in (("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj"))),
        of_attention["o_proj"],
        tuple(of_mlp[name] for name in (("gate_up_proj",) if family.fused else ("gate_proj", "up_proj"))),
        of_mlp["down_proj"],
        tuple(own[name] for name in ("resid_attn_dropout", "resid_mlp_dropout") if name in own),
    )


def layers_of(model: Any, family: Family) -> list[LayerParts]:
    """The layers that a forward pass runs."""
    layers = list(model._modules["model"]._modules["layers"]._modules.values())
    return [parts_of(layer, family) for layer in layers[: model.config.num_hidden_layers]]


class LayerNumbers(NamedTuple):
    window: int  # last positions of its path that it sees, 0 for all
    rotary: str | None  # which rotary embedding turns its queries and keys; None where nothing does


class Numbers(NamedTuple):
    """What a forward pass depends on beside weights. Those that multiply are 1, and caps 0, where a family has none."""

    scale: float  # of scores
    score_cap: float  # scores become cap * tanh(score / cap)
    eps: float
    embedding_scale: float
    residual_scale: float  # of what attention and MLP add
    logit_scale: float
    logit_cap: float
    activation: str
    rotary_scales: tuple[float, ...]  # of every kind's cos and sin
    layers: tuple[LayerNumbers, ...]


def numbers_of(model: Any, family: Family) -> Numbers:
    """AttributeError or KeyError where the model is not built as its family is."""
    config, decoder, layers = model.config, model.model, layers_of(model, family)
    first = layers[0]
    embed = decoder.embed_tokens
    scaled = getattr(embed, "embed_scale", None)
    kinds = rotary_kinds(decoder.rotary_emb)
    numbers = tuple(
        LayerNumbers(_window(family, config, index), _rotary(kinds, config, parts, index))
        for index, parts in enumerate(layers)
    )
    return Numbers(
        first.attention.scaling,
        score_cap(first.attention) if family.caps_scores else 0.0,
        eps_of(decoder.norm),
        # In the table's own numbers, as the family's embedding multiplies them.
        float(scaled.to(embed.weight.dtype)) if scaled is not None else getattr(decoder, "embedding_multiplier", 1.0),
        getattr(first.layer, "residual_multiplier", 1.0),
        1 / config.logits_scaling if family.divides_logits else 1.0,
        (config.final_logit_softcapping or 0.0) if family.caps_logits else 0.0,
        ACTIVATIONS[type(first.activation).__name__],
        tuple(getattr(decoder.rotary_emb, f"{kind}attention_scaling") for kind in kinds),
        numbers,
    )


def score_cap(attention: Any) -> float:
    return getattr(attention, "attn_logit_softcapping", None) or 0.0


def eps_of(norm: Any) -> float:
    eps: float = norm.eps if "eps" in vars(norm) else norm.variance_epsilon
    return eps


def rotary_kinds(rotary: Any) -> list[str]:
    """What begins the names of its tables: nothing where it has one, a kind of layer and "_" where each has its own."""
    return [f"{kind}_" for kind in rotary.layer_types] if "layer_types" in vars(rotary) else [""]


def _window(family: Family, config: Any, index: int) -> int:
    """As the mask is made, whatever the attention module remembers of the config."""
    slides = family.windows == "all" or (family.windows == "some" and config.layer_types[index] == "sliding_attention")
    return (config.sliding_window or 0) if slides else 0


def _rotary(kinds: list[str], config: Any, parts: LayerParts, index: int) -> str | None:
    if not getattr(parts.attention, "use_rope", True):
        return None
    return kinds[0] if kinds == [""] else f"{config.layer_types[index]}_"
