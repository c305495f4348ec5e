"""From logits to accepted tokens.

verifier.py         each draft tree walked for as long as it guessed what the model chooses
device_verify.py    the same on the device, in one launch, with drafting behind it
verdict.py          what verification says of a thread
processor_state.py  which logits processors keep state between calls
"""
