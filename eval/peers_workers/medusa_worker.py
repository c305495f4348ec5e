"""medusa-llm 0.1: its decoder, its tree, its copy of Llama, with Medusa heads that have the base's unembedding.

That copy knows neither grouped queries nor another rotary base than 10000, so key and value heads are repeated, which
changes no result and costs it time, and the rotary layers are made again.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from serve import Answer, serve

if TYPE_CHECKING:
    from torch import Tensor

CHOICES = [1, 3, 2]  # two heads, ten nodes; the package's own [1, 7, 6] is fifty, which take a CPU three times as long


class Ids:
    """Stands in for the tokenizer, by which `medusa_generate` ends and turns every step's tokens into text."""

    eos_token_id = None

    @classmethod
    def from_pretrained(cls, *_: Any) -> Ids:
        return cls()

    def decode(self, ids: Tensor, **_: Any) -> Tensor:
        return ids


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    import torch
    from medusa.model import medusa_model
    from safetensors.torch import load_file

    torch.set_num_threads(settings["threads"])
    base = _base(settings)
    medusa_model.AutoTokenizer = Ids
    model = medusa_model.MedusaModel(base, len(CHOICES) - 1, 1, settings["model"])
    heads = load_file(f"{settings['heads']}/medusa_lm_head.safetensors")
    wanted = {name: tensor for name, tensor in heads.items() if name[:2] in ("0.", "1.")}
    if wrong := model.medusa_head.load_state_dict(wanted, strict=False).unexpected_keys:
        raise ValueError(f"{settings['heads']} has other parts than residual blocks: {wrong}")
    Ids.eos_token_id = settings["eos"][0]

    def answer(ids: list[int], limit: int, sampling: dict[str, Any] | None) -> tuple[list[int], float, float | None]:
        assert sampling is None, "eval/peers.py says that it is greedy"
        given, shown, first = torch.tensor([ids]), torch.tensor([]), None
        started = time.perf_counter()
        for step in model.medusa_generate(given, temperature=0.0, max_steps=limit, medusa_choices=CHOICES):
            shown = step["text"]
            first = first or time.perf_counter() - started
            if len(shown) >= limit:
                break
        found = shown.tolist()[:limit]
        seconds = time.perf_counter() - started
        end = next((place for place, token in enumerate(found) if token in settings["eos"]), len(found))
        return found[: end + 1], seconds, first  # a step may accept tokens beyond the end

    return {"versions": {"torch": torch.__version__}}, answer


def _base(settings: dict[str, Any]) -> Any:
    import torch
    from medusa.model.modeling_llama_kv import LlamaForCausalLM, LlamaRotaryEmbedding
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    with open(f"{settings['model']}/config.json") as file:
        given = json.load(file)
    heads = given["num_attention_heads"]
    shared, width = heads // given["num_key_value_heads"], given["hidden_size"] // heads
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{name: given[name] for name in (*names, "rms_norm_eps", "hidden_act", "tie_word_embeddings")},
        num_key_value_heads=heads,
        max_position_embeddings=settings["context"],
    )
    weights = load_file(f"{settings['model']}/model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = weight.view(-1, width, weight.shape[1]).repeat_interleave(shared, 0)
            weights[name] = by_head.reshape(-1, weight.shape[1])
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    base = LlamaForCausalLM(config).eval()
    base.load_state_dict(weights, strict=False)
    for layer in base.model.layers:
        theta = given["rope_parameters"]["rope_theta"]
        layer.self_attn.rotary_emb = LlamaRotaryEmbedding(width, settings["context"], base=theta)
    unembed = torch.nn.Linear(given["hidden_size"], given["vocab_size"])
    unembed.weight = base.lm_head.weight
    bias = torch.zeros(given["vocab_size"])
    bias[settings["banned"]] = float("-inf")  # suppressed, as everywhere else
    unembed.bias = torch.nn.Parameter(bias)
    base.lm_head = unembed
    return base.requires_grad_(False)


if __name__ == "__main__":
    serve(start)
