"""LoRA plus the two control rows: attaching, the training forward, and the files that are shipped.

peft keeps whole rows (not deltas) for the trained tokens and uses one parameter for the tied embedding and lm_head.
Its forward copies the whole embedding matrix twice to put them in; `label_losses` reads the same parameter without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from medusa_apar.finetune.packing import IGNORED, PackedRow, Tokens, attention_mask

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORK_LIKE = [":", "\n"]  # [Fork] follows what ":" ends, and a line break follows it
CHILD_LIKE = [":", " "]  # after [Child], as after ":", comes the detail


@dataclass(slots=True)
class Losses:
    """Cross-entropies of one row's labels, and what each label is."""

    values: torch.Tensor  # [L]
    is_fork: torch.Tensor  # [L] bool: the label is [Fork]
    in_trunk: torch.Tensor  # [L] bool
    says_fork: torch.Tensor  # [L] bool: the model's first choice is [Fork]


def attach_lora(model, tokenizer, tokens: Tokens, rank: int = 16, alpha: int = 32) -> PeftModel:
    """The model with LoRA on every linear layer and trainable, freshly initialised control rows."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=LORA_MODULES,
        trainable_token_indices=[tokens.fork, tokens.child],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    weight = embedding(tuned)
    with torch.no_grad():
        for row, like in zip(control_rows(tuned), (FORK_LIKE, CHILD_LIKE), strict=True):
            ids = tokenizer("".join(like), add_special_tokens=False)["input_ids"]
            row.copy_(weight[ids].mean(0))
    return tuned


def embedding(tuned: PeftModel) -> torch.Tensor:
    """[vocabulary, hidden] the frozen base embedding, which is also the base's lm_head."""
    return tuned.get_input_embeddings().token_adapter.base_layer.weight


def control_rows(tuned: PeftModel) -> torch.nn.Parameter:
    """[2, hidden] the trained rows of `[Fork]` and `[Child]`, for input and output alike."""
    return tuned.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]


def label_losses(tuned: PeftModel, row: PackedRow, tokens: Tokens) -> Losses:
    """Losses of a row's labels; the lm_head runs only where there is one (half of the tokens)."""
    weight, rows = embedding(tuned), control_rows(tuned)
    control = torch.tensor([tokens.fork, tokens.child])
    embedded = F.embedding(row.input_ids, weight)
    for index, token in enumerate(control):
        embedded = torch.where((row.input_ids == token)[:, None], rows[index], embedded)
    labels = row.labels()
    at = (labels != IGNORED).nonzero()[:, 0]
    backbone = cast(torch.nn.Module, tuned.get_base_model().base_model)  # without the lm_head
    output = backbone(
        inputs_embeds=embedded[None],
        attention_mask=attention_mask(row.parents, embedded.dtype),
        position_ids=row.position_ids[None],
        use_cache=False,
    )
    hidden = output.last_hidden_state[0, at]
    logits = F.linear(hidden, weight).index_copy(1, control, F.linear(hidden, rows))
    labels = labels[at]
    values = F.cross_entropy(logits, labels, reduction="none")
    says_fork = logits.detach().argmax(-1) == tokens.fork
    return Losses(values, labels == tokens.fork, row.in_trunk[at], says_fork)


def save_adapter(tuned: PeftModel, folder: Path, tokenizer, tokens: Tokens, base: str) -> None:
    """peft's adapter files with float16 weights, and `apar_config.json` beside them."""
    tuned.peft_config["default"].base_model_name_or_path = base  # not a path of the machine that trained it
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    fork, child = tokenizer.convert_ids_to_tokens([tokens.fork, tokens.child])
    config = {
        "max_depth": 1,  # corpus.py's trees: children of the trunk, none of their own
        "fork_token_id": tokens.fork,
        "child_token_id": tokens.child,
        "fork_token": fork,
        "child_token": child,
        "base": base,
        "template": "chatml",
    }
    (folder / "apar_config.json").write_text(json.dumps(config, indent=2) + "\n")
