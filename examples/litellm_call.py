"""litellm against `medusa-apar serve`, streamed: the server is an OpenAI-compatible provider to it.

    python examples/litellm_call.py "What are the key skills of a good leader?"

Needs `medusa-apar serve` in another terminal, and `pip install litellm` in an environment of its own: what it pins is
not what we pin.
"""

import os
import sys

import litellm

stream = litellm.completion(
    model="openai/" + os.environ.get("MODEL", "smollm2-135m"),
    api_base=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    messages=[{"role": "user", "content": sys.argv[1]}],
    temperature=0,
    max_tokens=256,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
