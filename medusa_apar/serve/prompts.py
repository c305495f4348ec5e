"""From texts, conversations and tools to token ids. What cannot be is refused here, before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from medusa_apar.engine.admission import check_ids
from medusa_apar.events.texts import TokenTexts
from medusa_apar.facts import ModelFacts
from medusa_apar.models.chat import encode_messages, rendered

from .errors import ApiError, refused
from .schemas import ChatBody, CompletionBody, Message

_LONG = 1 << 14  # characters that are looked at before they are tokenized


def prompts_of(body: CompletionBody, facts: ModelFacts) -> list[list[int]]:
    """Token ids of a completion's prompts, none of them empty. ApiError 400 for what cannot be."""
    with refused("prompt"):
        for prompt in body.prompt:
            if isinstance(prompt, str):
                _check_length(facts, prompt)
        prompts = [text_ids(facts, p) if isinstance(p, str) else list(p) for p in body.prompt]
        for ids in prompts:
            if not ids:
                raise ValueError("the prompt is empty: it has no token that the model could go on from.")
            check_ids(facts.vocabulary, ids)
    return prompts


def text_ids(facts: ModelFacts, text: str, special: bool = True) -> list[int]:
    tokenizer: Any = facts.tokenizer
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def chat_ids(
    facts: ModelFacts, messages: Sequence[Message], tools: list[dict] | None = None, fits: bool = False
) -> list[int]:
    """What the chat template makes of a conversation. ValueError where it refuses that.

    fits: ApiError 400 for one that is much too long for the context, without tokenizing it.
    """
    plain = [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if any("tool_calls" in message for message in plain):
        _check_knows_tools(facts, "messages")
    tokenizer: Any = facts.tokenizer
    if fits and tokenizer.chat_template and sum(len(message["content"]) for message in plain) > _LONG:
        _check_length(facts, rendered(tokenizer, plain, tools))
    ids: list[int] = encode_messages(tokenizer, plain, tools)["input_ids"][0].tolist()
    return ids


def tools_of(body: ChatBody, facts: ModelFacts) -> list[dict[str, Any]] | None:
    """As the chat template takes them: tool_choice "none" leaves them out, as vLLM does. ApiError 400 where it knows
    nothing of tools."""
    if not body.tools:
        return None
    _check_knows_tools(facts, "tools")
    return [tool.model_dump(exclude_none=True) for tool in body.tools] if body.may_call else None


def _check_length(facts: ModelFacts, text: str) -> None:
    """ApiError 400 for a text that cannot fit into the context, before it is tokenized, which would take long."""
    context = facts.context
    least = 0 if context is None else TokenTexts.of(facts.tokenizer).least_tokens(text)
    if context is not None and least >= context:
        said = f"The model's context has {context} tokens, but the prompt has {least} or more."
        raise ApiError(400, said, code="context_length_exceeded")


def _check_knows_tools(facts: ModelFacts, param: str) -> None:
    if not re.search(r"\btools\b", str(getattr(facts.tokenizer, "chat_template", None))):
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
