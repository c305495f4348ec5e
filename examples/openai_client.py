"""OpenAI's own client against `medusa-apar serve`: the answer as it streams, and how many threads wrote it.

    python examples/openai_client.py "What are the key skills of a good leader?"

Needs `medusa-apar serve` in another terminal, and `pip install openai`.
"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,  # the one model that is served
    messages=[{"role": "user", "content": sys.argv[1]}],
    temperature=0,
    max_tokens=256,
    stream=True,
    extra_body={"apar": {"events": True}},  # ours beside OpenAI's: chunks tell how the threads have grown
)

for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
stats = chunk.apar["stats"]  # of the last one
print(f"\n\n{stats['tokens']} tokens, written by {stats['threads']} threads in {stats['steps']} steps")
