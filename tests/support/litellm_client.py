"""What litellm makes of a server's answers, as a line of JSON. Its Python has litellm and not this package."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm  # noqa: E402

url, question, fields = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
litellm.suppress_debug_info = True
how = {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "x", "num_retries": 0, "messages": question}


def answered():
    answer = litellm.completion(**how, **fields)
    usage = answer.usage
    return {
        "text": answer.choices[0].message.content,
        "reason": answer.choices[0].finish_reason,
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    }


def streamed():
    text, reason, usage = "", None, None
    for chunk in litellm.completion(**how, **fields, stream=True, stream_options={"include_usage": True}):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        reason = chunk.choices[0].finish_reason or reason if chunk.choices else reason
        usage = getattr(chunk, "usage", None) or usage
    return {"text": text, "reason": reason, "usage": [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]}


def refused():
    try:
        litellm.completion(**how, max_tokens=10**9)
    except litellm.BadRequestError as error:
        return str(error)
    return ""


print(json.dumps({"whole": answered(), "streamed": streamed(), "refused": refused()}))
