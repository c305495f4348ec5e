"""LoRA plus the two control rows: attaching, the training forward, and the files that are shipped.

peft keeps whole rows (not deltas) for the trained tokens. Its forward copies the whole embedding matrix twice to put
them in; `label_losses` reads the same parameters without. Where embedding and unembedding are tied there is one
parameter for both, else one each.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from medusa_apar.job import filling, write_text
from medusa_apar.models.families import base_logit_scale
from medusa_apar.models.merge import put_adapter
from medusa_apar.runtimes.attention import current_forest, forest_attention
from medusa_apar.threads.control_tokens import CONFIG_NAME

from .distil import divergence, taught, without_control
from .lora_linear import frozen_alone
from .packing import IGNORED, PackedForest, PackedRow, Tokens, pack_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORK_LIKE = ":\n"  # [Fork] follows what ":" ends, and a line break follows it
CHILD_LIKE = ": "  # after [Child], as after ":", comes the detail


@dataclass(slots=True)
class Losses:
    """Cross-entropies of one row's labels, and what each label is."""

    values: torch.Tensor  # [L]
    is_fork: torch.Tensor  # [L] bool: the label is [Fork]
    in_trunk: torch.Tensor  # [L] bool
    says_fork: torch.Tensor  # [L] bool: the model's first choice is [Fork]
    against: torch.Tensor  # [A] -log(1 - p) of each token to be avoided
    from_base: torch.Tensor  # [D] divergence from the base where it teaches (`distil.py`)


def attach_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    rank: int = 16,
    alpha: int = 32,
    init: Path | None = None,
) -> PeftModel:
    """The model with LoRA on every linear layer and trainable control rows, both in float32 whatever its dtype.

    init: folder of an adapter to go on from (its rank holds then); otherwise LoRA starts at nothing and the control
        rows as the mean of what surrounds forks in plain text.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    names = [_name(model, module) for module in (inputs, outputs)]  # before peft wraps them
    if init is not None:
        tuned = put_adapter(model, init, is_trainable=True)
        trained = getattr(tuned.peft_config["default"], "trainable_token_indices", None)
        found = trained.get(names[0]) if isinstance(trained, dict) else trained
        if found != [tokens.fork, tokens.child]:
            raise ValueError(f"{init} trained the rows {trained}, not those of [Fork] and [Child].")
    else:
        rows: list[int] | dict[str, list[int]] = [tokens.fork, tokens.child]
        if outputs.weight is not inputs.weight:
            rows = {name: [tokens.fork, tokens.child] for name in names}
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            trainable_token_indices=rows,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, of a default of its own that will change
            tuned = get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if init is None:
        with torch.no_grad():
            for layer in _token_layers(tuned):
                for row, like in zip(_rows(layer), (FORK_LIKE, CHILD_LIKE), strict=True):
                    ids = tokenizer(like, add_special_tokens=False)["input_ids"]
                    row.copy_(layer.base_layer.weight[ids].float().mean(0))
    return tuned


def _token_layers(tuned: PeftModel) -> list[Any]:
    """peft's wrappers of the embedding and of the unembedding; a single one where the two are tied."""
    inputs, outputs = tuned.get_input_embeddings(), cast(Any, tuned.get_base_model()).get_output_embeddings()
    layers = [getattr(module, "token_adapter", module) for module in (inputs, outputs)]
    return layers[:1] if _rows(layers[0]) is _rows(layers[1]) else layers


def _rows(layer: Any) -> torch.nn.Parameter:
    """[2, hidden] the trained rows of `[Fork]` and `[Child]`."""
    rows: torch.nn.Parameter = layer.trainable_tokens_delta["default"]
    return rows


def control_rows(tuned: PeftModel) -> list[torch.nn.Parameter]:
    """[2, hidden] the trained rows of `[Fork]` and `[Child]`: of the embedding, and of an untied unembedding."""
    return [_rows(layer) for layer in _token_layers(tuned)]


def _name(model: torch.nn.Module, module: torch.nn.Module) -> str:
    """The last part of a module's name, which is how peft finds it."""
    found: str = next(name.rpartition(".")[2] for name, other in model.named_modules() if other is module)
    return found


def check_forward(tuned: PeftModel) -> None:
    """NotImplementedError where `label_losses` would train by other logits than the model's own.

    Embedding and unembedding are done by hand there; a family that does more to them than is known shows here.
    """
    model = cast(Any, tuned.get_base_model())
    ids = [token for token in range(5, 14) if token < model.get_input_embeddings().weight.shape[0]]
    row = pack_threads([(ids, -1, 0)]).to(model.get_input_embeddings().weight.device)
    with torch.no_grad(), tuned.disable_adapter():  # peft leaves out an unembedding's bias where it puts in rows
        ours = _logits(tuned, row, row.trained.nonzero()[:, 0], [])
        with forest_attention(model, "sdpa"), current_forest(cast(Any, PackedForest(row))):
            theirs = model(
                input_ids=row.input_ids[None],
                attention_mask=torch.ones_like(row.input_ids)[None],
                position_ids=row.position_ids[None],
                use_cache=False,
            ).logits[0]
    # Rounding in bfloat16 is well below this, a scale that is left out well above.
    if float((ours - theirs).abs().max()) > 0.03 * float(theirs.abs().max()):
        raise NotImplementedError(
            f"{type(model).__name__} makes its logits in a way that training does not know, so it cannot be tuned here."
        )


def label_losses(tuned: PeftModel, row: PackedRow, tokens: Tokens, ends: torch.Tensor | None = None) -> Losses:
    """Losses of a row's labels, float32; the unembedding runs only where there is one (half of the tokens).

    ends: `distil.ending_tokens`, where the divergence from the base is wanted. That is within `lean_lora` alone.
    """
    labels, avoided = row.labels(), row.labels(of=row.avoided)
    wanted, unwanted = ((ids != IGNORED).nonzero()[:, 0] for ids in (labels, avoided))
    logits = _logits(tuned, row, torch.cat([wanted, unwanted]), [tokens.fork, tokens.child]).float()
    logits, others = logits.split([len(wanted), len(unwanted)])
    labels = labels[wanted]
    values = F.cross_entropy(logits, labels, reduction="none")
    says_fork = logits.detach().argmax(-1) == tokens.fork
    against = _unlikelihood(others, avoided[unwanted])
    in_trunk = row.in_trunk[wanted]
    from_base = values.new_zeros(0)
    if ends is not None:
        of = taught(row.input_ids[wanted], labels, tokens)
        if bool(of.any()):
            plain = without_control(row, tokens)
            with torch.no_grad(), frozen_alone(tuned):
                teacher = _logits(tuned, plain.row, plain.places[wanted[of]], []).float()
            from_base = divergence(logits[of], teacher, in_trunk[of], tokens, ends)
    return Losses(values, labels == tokens.fork, in_trunk, says_fork, against, from_base)


def _unlikelihood(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[A] -log(1 - p) of each row's token, which a p of nearly 1 does not overflow."""
    if not len(ids):
        return logits.new_zeros(0)
    without = logits.scatter(1, ids[:, None], float("-inf"))
    return logits.logsumexp(-1) - without.logsumexp(-1)


def _logits(tuned: PeftModel, row: PackedRow, at: torch.Tensor, control: list[int]) -> torch.Tensor:
    """[len(at), vocabulary] of these places of a row, with the trained rows of the `control` tokens."""
    layers = _token_layers(tuned)
    into, out = layers[0], layers[-1]
    model = cast(Any, tuned.get_base_model())
    embedded = into.base_layer(row.input_ids)  # with the scale that Gemma's embedding applies itself
    scale = getattr(into.base_layer, "embed_scale", None)
    for index, token in enumerate(control):
        own = _rows(into)[index].to(embedded.dtype)
        own = own if scale is None else own * torch.as_tensor(scale).to(own)
        embedded = torch.where((row.input_ids == token)[:, None], own, embedded)
    # The attention that will decode: paths narrowed by each layer's own window, soft caps and sinks included.
    with forest_attention(model, "sdpa"), current_forest(cast(Any, PackedForest(row))):
        output = model.base_model(  # without the unembedding
            inputs_embeds=embedded[None],
            attention_mask=torch.ones_like(row.input_ids)[None],  # without one, equal positions would split the row
            position_ids=row.position_ids[None],
            use_cache=False,
        )
    hidden = output.last_hidden_state[0, at]
    bias = getattr(out.base_layer, "bias", None)
    logits = F.linear(hidden, out.base_layer.weight, bias)
    if control:
        places = torch.tensor(control, device=hidden.device)
        own = F.linear(hidden, _rows(out).to(hidden.dtype), None if bias is None else bias[places])
        logits = logits.index_copy(1, places, own)
    return base_logit_scale(logits, model)


def save_adapter(
    tuned: PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    base: str,
    max_depth: int,
    own_tokens: bool = False,
) -> None:
    """peft's adapter files with float16 weights, and `apar_config.json` beside them.

    max_depth: of the trees that were trained on; deeper forks are banned when generating.
    own_tokens: the control tokens are not in the base's vocabulary, so the tokenizer is saved too.
    """
    tuned.peft_config["default"].base_model_name_or_path = base  # not a path of the machine that trained it
    with filling(folder) as partial:
        tuned.save_pretrained(str(partial), save_embedding_layers=False)
        file = partial / "adapter_model.safetensors"
        weights = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        if own_tokens:
            tokenizer.save_pretrained(str(partial))
        texts: Any = tokenizer.convert_ids_to_tokens([tokens.fork, tokens.child])
        fork, child = texts
        config = {
            "max_depth": max_depth,
            "fork_token_id": tokens.fork,
            "child_token_id": tokens.child,
            "fork_token": fork,
            "child_token": child,
            "base": base,
        }
        write_text(partial / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
