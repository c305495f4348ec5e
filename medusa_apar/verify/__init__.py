"""From logits to accepted tokens.

tail.py               what happens behind a forward pass: verification on the device, on the host, or both
host_verify.py        verification on the host: the kernels' reference, path by path where processors ask for it
device_verify.py      verification in one launch, with drafting behind it
sampler.py            how one request's tokens come out of logits: processors, bans, warpers, choice
recipe.py             what transformers' processors do to logits, as operations for compiled code
path_changes.py       what processors that look at a path do to scores on a device
logprobs.py           log-probabilities that requests ask to be told
scoring.py            what plain decoding says of a given text
verify_result.py      what verification says of a thread
control_processor.py  the fork rule as a logits processor of transformers
penalties.py          presence and frequency penalties as a logits processor of transformers
min_tokens.py         end tokens held back until an answer has so many, as a logits processor of transformers
guides.py             structured output: what a grammar of JSON allows behind a path
processor_state.py    which logits processors keep state between calls
"""
