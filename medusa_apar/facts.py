"""What requests are made for, whichever engine answers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from medusa_apar.models.families import context_length, embedding_rows, max_positions, unembedding_size
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH, ControlTokens
from medusa_apar.triton_kernels.reference import TypicalAcceptance


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Args:
    tokenizer: None where there is none; what needs one is refused then.
    generation_config: the model's own.
    vocabulary: tokens that it can write, the rows of its unembedding. input_vocabulary: tokens that it can be fed, the
        rows of its embedding.
    context: most tokens of prompt and answer together; None where nothing says it.
    positions: most tokens of a path, beyond which none can be; None where positions go on.
    control_token_ids: None where it cannot fork by itself.
    unforked: fields of a request that keep its answer to one thread.
    fork, max_threads, max_depth, typical: what counts where a request does not say; `MedusaApar.__call__` has them.
    """

    tokenizer: Any
    generation_config: GenerationConfig
    vocabulary: int
    input_vocabulary: int
    context: int | None = None
    positions: int | None = None
    control_token_ids: ControlTokens | None = None
    fork: str = "auto"
    max_threads: int | None = None
    max_depth: int = DEFAULT_MAX_DEPTH
    typical: TypicalAcceptance | None = None
    unforked: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, **others: Any) -> ModelFacts:
        """The facts of a model that is loaded; others: what it does not say itself."""
        positions = context_length(model)
        return cls(
            generation_config=model.generation_config or GenerationConfig(),
            vocabulary=unembedding_size(model)[0],
            input_vocabulary=embedding_rows(model),
            context=min(filter(None, (max_positions(model), positions)), default=None),
            positions=positions,
            **others,
        )
