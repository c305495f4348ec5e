"""Medusa heads: several tokens guessed ahead from one hidden state.

modules.py       MedusaHeads: the heads of one model, `draft` gives each head's likeliest tokens
checkpoints.py   the head files found in the wild (V1, V2, Medusa-2, vLLM), read into one form
answers.py       the tuned model's own answers, their hidden states computed once: what heads are trained on
train.py         `python -m medusa_apar.heads.train`: heads trained on the tuned model's own answers
"""

from medusa_apar.heads.modules import MedusaHeads, ResidualBlock

__all__ = ["MedusaHeads", "ResidualBlock"]
