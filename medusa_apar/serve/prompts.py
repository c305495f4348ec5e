"""From texts, conversations and tools to token ids. What cannot be is refused here, before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from medusa_apar.events.texts import TokenTexts
from medusa_apar.generate import MedusaApar
from medusa_apar.models.chat import encode_messages, rendered
from medusa_apar.models.families import context_length, unembedding_size

from .errors import ApiError, refused
from .schemas import ChatBody, CompletionBody, Message

_LONG = 1 << 14  # characters that are looked at before they are tokenized


def prompts_of(body: CompletionBody, apar: MedusaApar) -> list[list[int]]:
    """Token ids of a completion's prompts, none of them empty. ApiError 400 for what cannot be."""
    with refused("prompt"):
        for prompt in body.prompt:
            if isinstance(prompt, str):
                _check_length(apar, prompt)
        prompts = [text_ids(apar, p) if isinstance(p, str) else list(p) for p in body.prompt]
        for ids in prompts:
            if not ids:
                raise ValueError("the prompt is empty: it has no token that the model could go on from.")
            check_ids(apar, "prompt", ids)
    return prompts


def text_ids(apar: MedusaApar, text: str, special: bool = True) -> list[int]:
    tokenizer: Any = apar.tokenizer
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def chat_ids(
    apar: MedusaApar, messages: Sequence[Message], tools: list[dict] | None = None, fits: bool = False
) -> list[int]:
    """What the chat template makes of a conversation. ValueError where it refuses that.

    fits: ApiError 400 for one that is much too long for the context, without tokenizing it.
    """
    plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if any("tool_calls" in message for message in plain):
        _check_knows_tools(apar, "messages")
    tokenizer: Any = apar.tokenizer
    if fits and tokenizer.chat_template and sum(len(message["content"]) for message in plain) > _LONG:
        _check_length(apar, rendered(tokenizer, plain, tools))
    return encode_messages(tokenizer, plain, tools)["input_ids"][0].tolist()


def tools_of(body: ChatBody, apar: MedusaApar) -> list[dict[str, Any]] | None:
    """As the chat template takes them: tool_choice "none" leaves them out, as vLLM does. ApiError 400 where it knows
    nothing of tools."""
    if not body.tools:
        return None
    _check_knows_tools(apar, "tools")
    return [tool.model_dump(exclude_none=True) for tool in body.tools] if body.may_call else None


def context_of(apar: MedusaApar) -> int | None:
    """Tokens of prompt and answer together, at most."""
    config = apar.model.config.get_text_config(decoder=True)
    known = (getattr(config, "max_position_embeddings", None), context_length(apar.model))
    return min((length for length in known if length), default=None)


def check_ids(apar: MedusaApar, name: str, ids: Sequence[int]) -> None:
    """ApiError 400 for one that the model does not have."""
    size = unembedding_size(apar.model)[0]
    wrong = next((id for id in ids if not 0 <= id < size), None)
    if wrong is not None:
        said = f"{name} holds the token id {wrong}, but the model has ids from 0 to {size - 1}."
        raise ApiError(400, said, param=name)


def _check_length(apar: MedusaApar, text: str) -> None:
    """ApiError 400 for a text that cannot fit into the context, before it is tokenized, which would take long."""
    context = context_of(apar)
    least = 0 if context is None else TokenTexts.of(apar.tokenizer).least_tokens(text)
    if context is not None and least >= context:
        said = f"The model's context has {context} tokens, but the prompt has {least} or more."
        raise ApiError(400, said, code="context_length_exceeded")


def _check_knows_tools(apar: MedusaApar, param: str) -> None:
    if not re.search(r"\btools\b", str(getattr(apar.tokenizer, "chat_template", None))):
        raise ApiError(400, f"{param} has tools, of which the model's chat template knows nothing.", param=param)


def _plain(message: Message, name: str) -> dict[str, Any]:
    """A message as chat templates take it: the arguments of calls are objects there."""
    kept = message.model_dump(exclude_none=True, include={"role", "content", "name", "tool_calls", "tool_call_id"})
    kept = {"content": "", **kept, "role": "system" if message.role == "developer" else message.role}
    for index, call in enumerate(kept.get("tool_calls", ())):
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (json.JSONDecodeError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            param = f"{name}.tool_calls[{index}].function.arguments"
            raise ApiError(400, f"{param} is not a JSON object.", param=param)
        call["function"]["arguments"] = arguments
    return kept
