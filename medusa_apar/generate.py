"""The drop-in: `model.generate(**inputs, custom_generate=medusa_apar.attach(model, heads=...))`."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.events import Consumer
from medusa_apar.events.streaming import EndedOnce, ended_on_error
from medusa_apar.heads import DraftHeads
from medusa_apar.models.families import unembedding_size
from medusa_apar.runtimes.cpu.runtime import unsupported_reason
from medusa_apar.runtimes.devices import device_of
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.said import say_once
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_policy import ForkIf
from medusa_apar.triton_kernels.reference import TypicalAcceptance

from . import checks, new_request
from .call import Prepared, answer, callers_arguments
from .facts import ModelFacts
from .output import MedusaAparOutput
from .requests import CallOptions

logger = logging.getLogger(__name__)


class MedusaApar:
    """A model with its heads and control tokens; what `attach` and `load` return.

    Attributes: `model`, `tokenizer` (or None), `heads` (or None), `control_token_ids` (`ControlTokens` or None).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: DraftHeads | None,
        control: ControlTokens | None,
        tokenizer: PreTrainedTokenizerBase | None,
        options: EngineOptions,
        max_threads: int | None,
        max_depth: int,
        runtime: Runtime,
        typical: TypicalAcceptance | None = None,
        fork: str = "auto",
        pick: partial[Runtime] | None = None,
    ):
        self.model, self.heads, self.control_token_ids, self.tokenizer = model, heads, control, tokenizer
        self.options, self._pick = options, pick  # of the engine that each call opens
        # Where a call does not say:
        self.max_threads, self.max_depth, self.typical, self.fork = max_threads, max_depth, typical, fork
        self._streamer: EndedOnce | None = None  # of a call of `generate`
        self._fits = False  # whether `generate` has just seen to it
        self._left_compiled = False  # whether the CPU runtime was left for what the model had become
        self._take(runtime)

    @property
    def facts(self) -> ModelFacts:
        """The facts as they are now: the model may change, and they do not."""
        names = ("tokenizer", "control_token_ids", "fork", "max_threads", "max_depth", "typical")
        return ModelFacts.of(self.model, **{name: getattr(self, name) for name in names})

    def _take(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._state: tuple | None = _state(self.model)  # None: to be picked anew
        if self.heads is not None:
            self.heads.refresh()

    def _fit(self) -> None:
        """Has a runtime picked anew where the model has become another since, and where it has become itself again;
        ValueError where that cannot be."""
        if self._pick is not None:
            before, why = self.runtime, self.runtime.unsupported_reason()
            same = self._state == _state(self.model)
            back = self._left_compiled and unsupported_reason(self.model) is None
            if not same or why is not None or back:
                self._take(self._pick())
                left = before.facts.backend == "cpu" != self.runtime.facts.backend
                self._left_compiled = left or (self._left_compiled and not back)
                if left and same:
                    say_once(logger, f"{type(self.model).__name__} runs in torch from now on, since {why}.")
        if self.heads is not None:
            self.heads.check_matches(self.model)
        if self.control_token_ids is not None:
            self.control_token_ids.check_matches(unembedding_size(self.model)[0])

    def refresh(self) -> None:
        """Drops what was copied from weights, so that the next call reads them all anew.

        Never needed after `load_state_dict`, merging, averaging or a training step: calls notice those by themselves
        (`medusa_apar.runtimes.cpu.weight_fingerprint`). It is for whoever changes single values of a large model
        through `.data`.
        """
        self.runtime.refresh()
        if self.heads is not None:
            self.heads.refresh()

    def __repr__(self) -> str:
        """What runs, what guesses and where answers fork, on one line."""
        guesses = []
        if self.options.speculation is not None:
            if self.heads is not None:
                guesses.append(f"{self.heads.num_heads} {type(self.heads).__name__.removesuffix('Heads')} heads")
            if self.options.speculation.ngrams:
                guesses.append("n-grams")
            if self.options.speculation.recycling:
                guesses.append("recycled tokens")
        control = self.control_token_ids
        forks = "never forks"
        if self.fork == "lists":
            forks = "forks at list items"
        elif self.fork == "auto" and control is not None:
            forks = f"forks at token {control.fork_id}"
        drafts = f"guesses by {' and '.join(guesses)}" if guesses else "guesses nothing"
        return f"MedusaApar({type(self.model).__name__}, {self.runtime.description}, {drafts}, {forks})"

    def save_pretrained(self, folder: str | Path) -> None:
        """Model, tokenizer, control ids and heads as one folder, which `medusa_apar.load` and transformers read."""
        from .loading import save

        save(self, folder)

    def without_heads(self) -> MedusaApar:
        """The same model, weights laid out once for both, that decodes without drafting."""
        bare = copy.copy(self)
        bare.heads, bare.options = None, replace(self.options, draft_tree=DraftTree([]), speculation=None)
        return bare

    def speculating(self, speculation: Speculation) -> MedusaApar:
        """The same model and heads, weights laid out once for both, that guesses ahead otherwise."""
        other = copy.copy(self)
        other.options = replace(self.options, speculation=speculation)
        return other

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` with our engine: transformers' signature, and `fork`, `fork_if`, `max_threads`,
        `max_depth`, `seed`, `events`, `rescore`, `regenerate_below`, `presence_penalty` and `frequency_penalty` of
        `__call__`.

        It also serves `stop_strings` of a generation config, which the bare hook cannot: transformers drops the
        tokenizer they need. However the call ends, its streamer is told.

        Returns what `__call__` does: `return_dict_in_generate`, here or in a config, says which of the two.
        """
        told = None if streamer is None else EndedOnce(streamer)
        with ended_on_error(told):
            if kwargs.get("cache_implementation") == "paged":  # transformers would decode by itself, without the hook
                raise NotImplementedError("cache_implementation='paged' is not supported: the KV pool is the cache.")
            # Of some of it transformers would make a TypeError before it asks the hook.
            checks.check_sampling(
                kwargs, vars(generation_config) if generation_config else {}, vars(self.model.generation_config)
            )
            self._fit()
            bound = copy.copy(self)
            bound._fits, bound._streamer = True, told
            bound.tokenizer = self.tokenizer if tokenizer is None else tokenizer
            config = generation_config
            for defaults in (config, self.model.generation_config):
                if kwargs.get("stop_strings") is None and defaults is not None:
                    kwargs["stop_strings"] = defaults.stop_strings
            if config is not None and config.stop_strings is not None:
                config = copy.deepcopy(config)
                config.stop_strings = None
            if self.model.generation_config.stop_strings is not None:
                # transformers fills a None from the model's defaults: give it the same model with other defaults.
                bound.model = copy.copy(self.model)
                bound.model.generation_config = copy.deepcopy(self.model.generation_config)
                bound.model.generation_config.stop_strings = None
            return cast(Any, bound.model).generate(inputs, config, custom_generate=bound, **kwargs)

    def engine(self, **changes: Any) -> Engine:
        """An engine that requests join and leave at every step, until it is closed.

        changes: of `EngineOptions`, for this engine alone: pool_slots, prefix_cache, max_requests, max_waiting ...
        """
        self._fit()
        return Engine(self.model, self.runtime, self.heads, replace(self.options, **changes))

    request = new_request.request

    def __copy__(self) -> MedusaApar:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict) -> MedusaApar:
        """A hook of the same model, or of the model's copy where that is being copied with it."""
        other = copy.copy(self)
        model = memo.get(id(self.model))
        if model is not None and self._pick is not None:
            other.model, other.heads = model, copy.deepcopy(self.heads, memo)
            # A model that holds its hook is not complete yet: the first call picks what runs it.
            other._pick, other._state = partial(self._pick.func, model, *self._pick.args[1:]), None
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A hook cannot be pickled, as it holds a model and what runs it: save the model and its heads, and attach "
            "them again where they are loaded."
        )

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        fork: bool | str | None = None,
        fork_if: ForkIf | None = None,
        max_threads: int | None = None,
        max_depth: int | None = None,
        seed: int | None = None,
        events: Consumer | None = None,
        rescore: bool = False,
        regenerate_below: float | None = None,
        stop_strings: str | list[str] | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        **model_kwargs: Any,
    ) -> MedusaAparOutput | torch.Tensor:
        """The hook transformers calls after preparing its inputs; further arguments of `model.generate`:

        fork: where answers split; None is what `attach` was given. "auto" (or True): where the model emits `[Fork]`.
            "off" (or False): nowhere. "lists": by rule, at titled items of lists that the model writes by itself; for
            any chat model, untuned, and needs the tokenizer. The model was never tuned for it: items cannot see each
            other, so they repeat each other more, and lists grow longer; compare with "off" before you use it.
            From the second titled item of a list on the first thread writes the titles, and a child what stands behind
            each. A title is bold or not, and ends with a colon or a dash: "1. Regular hours: ...", "- **Light** - ...".
        fork_if: asked with a `ForkPoint` wherever the answer is about to fork; False goes on there in one thread, as if
            the model could not fork. It must go by nothing but the `ForkPoint`.
        max_threads, max_depth: of this call, in place of those given to `attach`. Lists fork the trunk only.
        seed: of the sampling noise; by default drawn from torch's global generator, so `torch.manual_seed` rules.
        events: called with everything that happens, as it happens: `medusa_apar.events` has what and in which order.
        rescore: holds the finished answer against plain decoding of the text as it is read, in one further pass over
            prompt and answer. The output's `agreement` says for every thread which share of its tokens plain
            greedy decoding chooses (not when sampling, where that says little) and what their mean log-probability is.
        regenerate_below: a share of tokens (greedy only). A thread that agrees with less of its own tokens is written
            anew, its descendants with it, by one thread that reads all text before it in reading order and `[Fork]`
            `[Child]`, so that it knows where to end; if it does not within 128 tokens, the first version stays. Earlier
            threads go first, as later ones read them. Judged is the text as first written, of a long thread the tokens
            among the first 64 of its part; the trunk never is. The answer stays the unlimited one cut short; where
            rewritten threads are much shorter it may end before `max_new_tokens`. Costs: up to 64 tokens beyond the
            limit, as many more as rewriting has made the answer shorter, a prefill and decoding without threads for
            every thread that is written anew, a second pass. `events` do not tell of what is rewritten.
        stop_strings: need the tokenizer, the call's own or the one given to `attach`.
        presence_penalty, frequency_penalty: OpenAI's, from -2 to 2: what a token's score loses if it stands behind the
            prompt on its thread's path, and what for each time it stands there. Greedy decoding heeds them too. They
            come behind `logits_processor`, as a `PresenceFrequencyLogitsProcessor` at its end would.

        Raises ValueError or NotImplementedError, in one sentence and before any work, for what cannot be combined; and
        ValueError in mid-run where logits processors leave no token to choose, or keep state that threads would mix up.
        """
        arguments = callers_arguments()
        streamer, tokenizer = self._streamer, arguments.get("tokenizer")
        if streamer is None and arguments.get("streamer") is not None:
            streamer = EndedOnce(arguments["streamer"])
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        with ended_on_error(streamer):
            checks.check_call(self, model, input_ids, generation_config, logits_processor, model_kwargs, arguments)
            checks.check_penalties(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty)
            if not self._fits:
                self._fit()
            return answer(
                self,
                Prepared(
                    *(input_ids, logits_processor, stopping_criteria, generation_config),
                    *(model_kwargs, arguments, tokenizer, streamer),
                    shows_prompt=self._streamer is not None,  # a streamer of `model.generate` has seen it
                ),
                CallOptions(
                    *(fork, fork_if, max_threads, max_depth, seed, events),
                    *(rescore, regenerate_below, stop_strings, presence_penalty, frequency_penalty),
                ),
            )


def _state(model: PreTrainedModel) -> tuple:
    """What a runtime is picked by, as far as it changes with a word (`model.half()`, `model.train()`)."""
    return model.dtype, model.training, device_of(model)
