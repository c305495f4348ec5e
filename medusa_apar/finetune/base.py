"""The model to be tuned, and two ids for its control tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_apar.models import hub
from medusa_apar.models.families import check_model

from .packing import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADDED = ("[Fork]", "[Child]")
# Tokens of a vocabulary that its chat model has no use for, best first. SmolLM2's come from its code pre-training.
SPARE = (
    ("<jupyter_script>", "<empty_output>"),
    (r"<\|reserved_special_token_\d+\|>", None),  # Llama 3
    (r"<unused\d+>", None),  # Gemma
    (r"<\|(?:extra|dummy|placeholder|unused)_?\d+\|>", None),
    (r"<SPECIAL_\d+>|\[control_\d+\]", None),  # Mistral
)


@dataclass(slots=True)
class Base:
    model: Any
    tokenizer: Any
    tokens: Tokens
    name: str  # how adapters name it
    added: bool  # the control tokens were added to the vocabulary


def load_base(
    name: str, dtype: torch.dtype, control: tuple[str, str] | None = None, trust_remote_code: bool = False
) -> Base:
    """A model with its control tokens: those asked for, else two spare ones of its vocabulary, else two added rows.

    ValueError where the tokenizer has no chat template or no end-of-text token to train with.
    """
    from medusa_apar.models.sources import read_model, read_tokenizer

    place = str(hub.embedded_model_dir(name)) if name in hub.EMBEDDED else name
    tokenizer: Any = read_tokenizer(place, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"{name} has no chat template: its tokenizer must say how a conversation is written.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name} has no end-of-text token, so no thread could end.")
    if control and (len(set(control)) < 2 or not all(text.strip() for text in control)):
        raise ValueError(
            f"the control tokens are {control[0]!r} and {control[1]!r}: they must be two, with a text each"
        )
    texts = control or spare_tokens(tokenizer) or ADDED
    unknown = [text for text in texts if text not in tokenizer.get_vocab()]
    model: Any = read_model(place, dtype, trust_remote_code=trust_remote_code)
    check_model(model)  # what cannot decode in threads need not learn them
    if unknown:
        tokenizer.add_special_tokens({"additional_special_tokens": list(texts)})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fork, child = tokenizer.convert_tokens_to_ids(list(texts))
    kept = name if name in hub.EMBEDDED or not Path(name).exists() else str(Path(name).resolve())
    return Base(model.eval(), tokenizer, Tokens(fork, child, tokenizer.eos_token_id), kept, bool(unknown))


def spare_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Two tokens of the vocabulary that the chat model has no use for, by the names that model makers give them."""
    vocabulary = tokenizer.get_vocab()
    for first, second in SPARE:
        if second is not None:
            if first in vocabulary and second in vocabulary:
                return first, second
            continue
        found = sorted((token for token in vocabulary if re.fullmatch(first, token)), key=vocabulary.__getitem__)
        if len(found) >= 2:
            return found[-2], found[-1]  # the first ones are the likelier to get a use later
    return None
