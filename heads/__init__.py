"""Draft heads: several tokens guessed ahead from one hidden state.

draft_heads.py       `DraftHeads`, what all kinds share
medusa.py            `MedusaHeads`, each head on its own
hydra.py             `HydraHeads`, each head sees the tokens drafted before it
eagle3/              EAGLE-3 drafters, which attend to what was written
drafters.py          what drafts with them beside a runtime: in torch, from packed weights, with the Triton kernels
weight_copies.py     what drafting copies of weights, kept until those change
checkpoints.py       the head files found in the wild (V1, V2, Medusa-2, vLLM), read into one form
layouts.py           heads in no layout: read from any, told of in a line, written where nothing is destroyed
vllm_layout.py       the layout that vLLM's Medusa drafter loads, and `export` into it
convert.py           `medusa-apar convert`: heads from one file layout into another
ask.py               the tuned model answers prompts with our own engine, threads included
own_answers.py       `medusa-apar answer`: such answers as a corpus
answers.py           answers with their hidden states, computed once: what heads are trained on
training_loop.py     updates until steps or time are used up, figures and a checkpoint, for heads of every kind
train.py             `medusa-apar train-heads`: heads that match the base's distribution
held_out.py          which records heads are judged by
losses.py            what heads are trained on and judged by
calibrate.py         `medusa-apar calibrate`: how often guesses are right, and the draft tree that follows
calibration_plot.py  the same, drawn
"""

import os

import torch
from transformers import PreTrainedModel

from medusa_apar.models import head_files
from medusa_apar.reading import reading

from . import checkpoints
from .draft_heads import DraftHeads, ResidualBlock
from .eagle3 import heads as eagle3
from .eagle3.heads import Eagle3Heads
from .hydra import HydraHeads
from .medusa import MedusaHeads

__all__ = ["DraftHeads", "Eagle3Heads", "HydraHeads", "MedusaHeads", "ResidualBlock", "load_heads"]


def load_heads(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
) -> DraftHeads:
    """Heads of any kind from a directory, file or Hub repository, attached to the model.

    dtype: None is the model's. token: of a Hub account; None is the one of `hf auth login`.
    """
    located = checkpoints.locate(path, token)
    medusa = any((located / name).exists() for name in head_files.FILES) or located.name in head_files.FILES
    if not medusa and eagle3.holds(located):
        state, config = eagle3.read(located)
        with reading(path, "cannot be used"):
            return Eagle3Heads.from_state(state, config, model, dtype)
    state, config = checkpoints.read(located)
    kind: type[MedusaHeads] | type[HydraHeads] = HydraHeads if "from_states" in state else MedusaHeads
    with reading(path, "cannot be used"):
        return kind.from_state(state, config, model, dtype)
