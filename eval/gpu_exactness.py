"""On a GPU: the engine over kernels, with CUDA graphs and without, token for token what it is over masks.

  python -m medusa_apar.eval.gpu_exactness --out FILE

Needs no weights: small random models in float32, whose logits are far apart, write what they will. They fork without
having been tuned, since one of their logits is raised; drafts come from untrained heads and from recalled answers.
Every line is a model and a way to run it; the file says how many tokens were compared, and which lines differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedModel

from medusa_apar.attaching import attach
from medusa_apar.heads import Eagle3Heads, HydraHeads, MedusaHeads
from medusa_apar.job import machine, write_text
from medusa_apar.threads.control_tokens import ControlTokens

VOCAB, EOS, FORK, CHILD = 2000, 2, 3, 4
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
MODELS = {
    "llama": LlamaConfig(**_SIZES),
    "mistral, window 100": MistralConfig(**_SIZES, sliding_window=100),
    "gemma2, window 64": Gemma2Config(**_SIZES, sliding_window=64),
    "llama, heads of 80": LlamaConfig(**_SIZES | {"head_dim": 80}),
}
WAYS: dict[str, dict[str, Any]] = {
    "threads": {},
    "medusa heads": {"heads": MedusaHeads},
    "hydra heads": {"heads": HydraHeads},
    "hydra heads, a small pool": {"heads": HydraHeads, "pool_slots": 1400},
    "hydra heads, all rows filled": {"heads": HydraHeads, "budget": 64},
    "an EAGLE-3 drafter": {"heads": Eagle3Heads, "budget": 64},
    "n-grams alone": {"speculation": "forest", "budget": 64},
    "hydra heads, three threads": {"heads": HydraHeads, "max_threads": 3},
    "sampled": {"heads": HydraHeads, "generate": {"do_sample": True, "seed": 5, "top_k": 0}},
    "sampled, top-k": {"heads": HydraHeads, "generate": {"do_sample": True, "seed": 5, "top_k": 40}},
    "penalised": {"heads": HydraHeads, "generate": {"repetition_penalty": 1.1, "presence_penalty": 0.3}},
}


def model_of(config: Any, device: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        head = torch.nn.Linear(config.hidden_size, VOCAB)
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        spread = float(head.weight.norm(dim=1).mean())
        head.bias[FORK], head.bias[EOS] = 0.6 * spread, 0.2 * spread
    model.set_output_embeddings(head)
    moved: PreTrainedModel = model.to(device)
    return moved


def answer(
    model: PreTrainedModel, attention: str, graphs: bool | None, way: dict[str, Any], limit: int, length: int
) -> Any:
    options = {name: value for name, value in way.items() if name not in ("heads", "generate")}
    heads = way["heads"].random(model) if "heads" in way else None
    apar = attach(
        model, heads, ControlTokens(FORK, CHILD), attention=attention, runtime="torch", cuda_graphs=graphs, **options
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (2, length), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : length // 4] = 0  # left padding: the second prompt is shorter
    more = {"do_sample": False} | way.get("generate", {})
    outputs = [
        apar.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, return_dict_in_generate=True, **more)
        for _ in range(2)  # the second call finds the graphs of the first
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences), "two calls differ"
    return outputs[1]


def run(
    out: Path, device: str, models: dict[str, Any] = MODELS, ways: Any = WAYS, limit: int = 200, length: int = 300
) -> list[dict]:
    rows = []
    for name, config in models.items():
        model = model_of(config, device)
        for label, way in ways.items():
            expected = answer(model, "sdpa", None, way, limit, length)
            for graphs in (False, True):
                row = {"model": name, "way": label, "graphs": graphs, "forks": expected.stats.forks}
                try:
                    ours = answer(model, "triton", graphs, way, limit, length)
                    row |= {
                        "tokens": int((expected.sequences[:, length:] != 0).sum()),
                        "steps": ours.stats.steps,
                        "equal": torch.equal(ours.sequences, expected.sequences),
                    }
                    if (
                        way.get("heads") is Eagle3Heads
                    ):  # whose drafts rest on what lies in the pool, and no text shows it
                        row["equal"] &= ours.stats.drafted == expected.stats.drafted
                        row["equal"] &= ours.stats.accepted == expected.stats.accepted
                except Exception as error:  # one way that fails is a line of the table, not its end
                    row |= {"equal": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                rows.append(row)
                print(row, flush=True)
                write_text(out, json.dumps({"machine": machine(), "rows": rows}, indent=1))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU, and there is none.")
    rows = run(args.out, "cuda")
    wrong = [row for row in rows if not row["equal"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} ways give the same tokens.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
