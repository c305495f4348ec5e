"""What steps of the compiled CPU runtime read and multiply, counted from a model's shapes: the two sides of a roofline.

Bytes are what a step cannot but read from memory: every weight once, and the keys and values of every slot in use once,
whatever its rows. Products are those that rows need, padding left out: of every matrix for each row, of the unembedding
for each verified row, and of each row with every slot of its path. A sliding window is taken for none, and what is as
small as a row (its embedding, activations, rotary tables) is not counted; drafting lies outside forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from transformers import PreTrainedModel

from medusa_apar.events import Drafted, StepFinished, StepStarted
from medusa_apar.events.recording import Recording
from medusa_apar.runtimes.cpu.layers import family_of, layers_of
from medusa_apar.runtimes.cpu.weights import GROUP_INPUTS, INPUTS, PANEL, up

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a stored weight
FLOAT = 4


class Counts(NamedTuple):
    """What an answer's steps came to, the prompt's among them."""

    steps: int
    rows: int
    verified: int  # rows whose logits are needed
    attended: int  # slots on the paths of all rows, each row's own among them
    slots: int  # in use, summed over steps

    @classmethod
    def of(cls, recording: Recording) -> Counts:
        rows = verified = attended = slots = steps = 0
        for event in recording.events:
            match event:
                case StepStarted():
                    for drafted in event.drafted:
                        lengths = list(_paths(recording, drafted))
                        rows, attended = rows + len(lengths), attended + sum(lengths)
                        verified += (1 + len(drafted.token_ids)) * drafted.verified
                case StepFinished():
                    steps, slots = steps + 1, slots + event.slots_used
        return cls(steps, rows, verified, attended, slots)


def _paths(recording: Recording, drafted: Drafted) -> Iterator[int]:
    """The length of each row's path, itself included."""
    behind = recording.tree_of(drafted).threads[drafted.thread].start + drafted.cached
    yield from range(behind + 1, behind + drafted.pending + 1)
    depths: list[int] = []
    for parent in drafted.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
        yield behind + drafted.pending + depths[-1]


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model built like Llama, packed as `kind`: "float32", "bfloat16" or "int8"."""

    kind: str
    layers: int
    matrices: tuple[tuple[int, int], ...]  # (outputs, inputs) of one layer's, as they are packed
    unembedding: tuple[int, int]
    heads: int
    kv_heads: int
    head_dim: int
    vectors: int  # float32 numbers of all biases and norms

    @classmethod
    def of(cls, model: PreTrainedModel, kind: str) -> Shapes:
        family, output = family_of(model), model.get_output_embeddings()
        if family is None:
            raise ValueError(f"{type(model).__name__} is none of the models that the compiled step knows.")
        layers = layers_of(model, family)
        parts, decoder = layers[0], cast(Any, model).model
        joined = (parts.qkv, (parts.output,), parts.gate_up, (parts.down,))
        matrices = tuple((sum(each.out_features for each in linears), linears[0].in_features) for linears in joined)
        biased = [
            up(outputs, PANEL)
            for linears, (outputs, _) in zip(joined, matrices, strict=True)
            if any(linear.bias is not None for linear in linears)
        ]
        biases = len(layers) * sum(biased)
        if getattr(output, "bias", None) is not None:
            biases += up(output.out_features, PANEL)
        norms = [decoder.norm, *(norm for parts in layers for norm in parts.all_norms)]
        return cls(
            kind,
            len(layers),
            matrices,
            tuple(output.weight.shape),
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            parts.attention.head_dim,
            biases + sum(norm.weight.numel() for norm in norms),
        )

    @property
    def weight_bytes(self) -> int:
        """What a step reads whatever its rows: matrices with their scales, biases and norms."""
        matrices = sum(map(self._matrix_bytes, self.matrices)) * self.layers + self._matrix_bytes(self.unembedding)
        return matrices + FLOAT * self.vectors

    def _matrix_bytes(self, shape: tuple[int, int]) -> int:
        outputs, inputs = up(shape[0], PANEL), up(shape[1], INPUTS[self.kind])
        scales = outputs * inputs // GROUP_INPUTS if self.kind == "int8" else 0
        return outputs * inputs * BYTES[self.kind] + FLOAT * scales

    @property
    def slot_bytes(self) -> int:
        """What a slot's keys and values take in all layers: int16 steps and scales beside int8 weights, else floats."""
        a_head = 2 * self.head_dim + FLOAT if self.kind == "int8" else FLOAT * self.head_dim
        return self.layers * self.kv_heads * 2 * a_head

    def read_bytes(self, counts: Counts) -> int:
        return counts.steps * self.weight_bytes + counts.slots * self.slot_bytes

    def macs(self, counts: Counts) -> int:
        """Multiplications, each with its addition."""
        row = self.layers * sum(outputs * inputs for outputs, inputs in self.matrices)
        logits = self.unembedding[0] * self.unembedding[1]
        attention = self.layers * self.heads * 2 * self.head_dim
        return counts.rows * row + counts.verified * logits + counts.attended * attention
