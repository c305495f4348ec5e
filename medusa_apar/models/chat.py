"""From a conversation to the prompt a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .sources import RELEASED_TOKENS

Message = dict[str, Any]  # "role": "system" | "user" | "assistant", "content"


def encode(tokenizer: Any, question: str) -> dict[str, Any]:
    """`encode_messages` of one question; ValueError where there is none."""
    if not question.strip():
        raise ValueError("the prompt is empty")
    return encode_messages(tokenizer, [{"role": "user", "content": question}])


def encode_messages(
    tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """`input_ids` and `attention_mask` [1, length], ready for an answer: the tokenizer's chat template, else Vicuna's
    for released APAR models, whose tokenizers carry none, else the last message as bare text. tools: for a
    template that knows them.

    ValueError, with the template's own words, where it refuses the conversation, and where no token comes of it.
    """
    if tokenizer.chat_template:
        encoded = _templated(tokenizer, messages, tools=tools, return_tensors="pt", return_dict=True)
    elif set(RELEASED_TOKENS) <= set(tokenizer.get_vocab()):
        encoded = tokenizer(_vicuna(messages), return_tensors="pt")
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    if not encoded["input_ids"].numel():
        raise ValueError("the conversation is empty to this model, whose vocabulary has no token for any of it")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def rendered(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """The text that the tokenizer's chat template makes, ready for an answer; arguments and ValueError as of
    `encode_messages`."""
    text: str = _templated(tokenizer, messages, tools=tools, tokenize=False)
    return text


def _templated(tokenizer: Any, messages: list[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except Exception as error:  # a template is a program that came with the model, and can fail in any way
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the conversation is refused by the model's chat template, which says: {words}") from error


def left_padded(prompts: Sequence[dict[str, Any]], device: Any = None) -> dict[str, Any]:
    """Prompts [1, length] of `encode_messages` as one batch [rows, longest], padded on the left."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def padded(name: str) -> torch.Tensor:
        rows = [torch.nn.functional.pad(p[name], (longest - p[name].shape[1], 0)) for p in prompts]
        return torch.cat(rows).to(device)

    return {name: padded(name) for name in ("input_ids", "attention_mask")}


def _vicuna(messages: list[Message]) -> str:
    try:
        from fastchat.conversation import get_conv_template
    except ImportError as error:
        raise ValueError("this model needs Vicuna's prompt template: pip install 'medusa-apar[vicuna]'") from error
    conversation = get_conv_template("vicuna_v1.1")
    roles = dict(zip(("user", "assistant"), conversation.roles, strict=True))
    for message in messages:
        if message["role"] == "system":
            conversation.set_system_message(message["content"])
        else:
            conversation.append_message(roles[message["role"]], message["content"])
    conversation.append_message(roles["assistant"], None)
    prompt: str = conversation.get_prompt()
    return prompt
