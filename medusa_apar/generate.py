"""The drop-in: `model.generate(**inputs, custom_generate=medusa_apar.attach(model, heads=...))`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMixin, StopStringCriteria

from medusa_apar.drafting.budget import EvenBudget, ForestBudget
from medusa_apar.drafting.candidates import Proposer
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine import draft_watch
from medusa_apar.engine.engine import Decoder
from medusa_apar.engine.fork_manager import ForkManager
from medusa_apar.engine.rescoring import Stitcher, first_limit, last_limit
from medusa_apar.engine.scheduler import Scheduler
from medusa_apar.events import Consumer
from medusa_apar.events.reporter import Reporter
from medusa_apar.events.streaming import EndedOnce, TextColumns, ended_on_error
from medusa_apar.heads import DraftHeads, load_heads
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.models.families import check_model, context_length, unembedding_size
from medusa_apar.runtimes.cpu.runtime import CpuRuntime, refusal
from medusa_apar.runtimes.devices import device_of
from medusa_apar.runtimes.measure import known_cost
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.runtimes.torch_runtime import TorchRuntime
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH, ControlTokens
from medusa_apar.threads.fork_policy import ForkIf, NoForks, fork_mode, fork_policy
from medusa_apar.threads.paragraph_tree import ParagraphTree, Thread, thread_key
from medusa_apar.threads.request import Ends, Request
from medusa_apar.triton_kernels.reference import TypicalAcceptance
from medusa_apar.verify.verifier import Verifier

from . import checks
from .output import MedusaAparOutput

logger = logging.getLogger(__name__)

# Rows of a forest, at most: past these a step's cost grows with every row (DESIGN.md, facts).
_BUDGET = {"cpu": 24, "cuda": 64}
_CANDIDATES = 32  # guesses of the heads below each root, at most, among which a forest's nodes are chosen


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
        draft_tree: DraftTree,
        budget: int | None,
        max_threads: int | None,
        max_depth: int,
        runtime: Runtime,
        pool_slots: int | None,
        cost: StepCost | None,
        speculation: Speculation | None,
        typical: TypicalAcceptance | None = None,
        fork: str = "auto",
        pick: partial[Runtime] | None = None,
    ):
        self.model, self.heads, self.control_token_ids, self.tokenizer = model, heads, control, tokenizer
        self.draft_tree, self.budget = draft_tree, budget
        self.max_threads, self.max_depth = max_threads, max_depth
        self.pool_slots, self._pick = pool_slots, pick
        # What a step costs, None to be measured before the first that drafts; not asked where `budget` was given.
        self.cost, self.speculation, self.typical = cost, speculation, typical
        self.fork = fork  # where a call does not say
        self._streamer: EndedOnce | None = None  # of a call of `generate`
        self._fits = False  # whether `generate` has just seen to it
        self._left_compiled = False  # whether the CPU runtime was left for what the model had become
        self._take(runtime)

    def _take(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._state: tuple | None = _state(self.model)  # None: to be picked anew
        if isinstance(self.heads, DraftHeads):
            self.heads.packing = runtime.kind if isinstance(runtime, CpuRuntime) else None
            self.heads.kernels = isinstance(runtime, TorchRuntime) and runtime.backend == "triton"
            self.heads.refresh()

    def _fit(self) -> None:
        """Has a runtime picked anew where the model has become another since, and where it has become itself again;
        ValueError where that cannot be."""
        if self._pick is not None:
            before, why = self.runtime, self.runtime.refusal()
            same = self._state == _state(self.model)
            back = self._left_compiled and refusal(self.model) is None
            if not same or why is not None or back:
                self._take(self._pick())
                left = isinstance(before, CpuRuntime) and not isinstance(self.runtime, CpuRuntime)
                self._left_compiled = left or (self._left_compiled and not back)
                if left and same:
                    _say_once(f"{type(self.model).__name__} runs in torch from now on, since {why}.")
        if isinstance(self.heads, DraftHeads):
            self.heads.check_matches(self.model)
        if self.control_token_ids is not None:
            self.control_token_ids.check_matches(unembedding_size(self.model)[0])

    def refresh(self) -> None:
        """Drops what was copied from weights, so that the next call reads them all anew.

        Never needed after `load_state_dict`, merging, averaging or a training step: calls notice those by themselves
        (`medusa_apar.runtimes.cpu.contents`). It is for whoever changes single values of a large model through `.data`.
        """
        self.runtime.refresh()
        if isinstance(self.heads, DraftHeads):
            self.heads.refresh()

    def __repr__(self) -> str:
        """What runs, what guesses and where answers fork, on one line."""
        guesses = []
        if self.speculation is not None:
            if self.heads is not None:
                guesses.append(f"{self.heads.num_heads} {type(self.heads).__name__.removesuffix('Heads')} heads")
            if self.speculation.siblings:
                guesses.append("n-grams")
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
        bare.heads, bare.draft_tree, bare.speculation = None, DraftTree([]), None
        return bare

    def speculating(self, speculation: Speculation) -> MedusaApar:
        """The same model and heads, weights laid out once for both, that guesses ahead otherwise."""
        other = copy.copy(self)
        other.speculation = speculation
        return other

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer=None,
        tokenizer=None,
        **kwargs,
    ):
        """`model.generate` with our decoder: transformers' signature, and `fork`, `fork_if`, `max_threads`,
        `max_depth`, `seed`, `events`, `verify` and `regenerate_below` of `__call__`.

        It also serves `stop_strings` of a generation config, which the bare hook cannot: transformers drops the
        tokenizer they need. However the call ends, its streamer is told.
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
        verify: str | None = None,
        regenerate_below: float | None = None,
        stop_strings: str | list[str] | None = None,
        **model_kwargs,
    ) -> MedusaAparOutput | torch.Tensor:
        """The hook transformers calls after preparing its inputs; further arguments of `model.generate`:

        fork: where answers split; None is what `attach` was given. "auto" (or True): where the model emits `[Fork]`.
            "off" (or False): nowhere. "lists": by rule, at titled items of lists that the model writes by itself; for
            any chat model, untuned, and needs the tokenizer. The model was never tuned for it: items cannot see each
            other, so they repeat each other more, and lists grow longer; compare with "off" before you use it.
            `ListForks` has the rule.
        fork_if: asked with a `ForkPoint` wherever the answer is about to fork; False goes on there in one thread, as if
            the model could not fork. It must go by nothing but the `ForkPoint`.
        max_threads, max_depth: of this call, in place of those given to `attach`. Lists fork the trunk only.
        seed: of the sampling noise; by default drawn from torch's global generator, so `torch.manual_seed` rules.
        events: called with everything that happens, as it happens: `medusa_apar.events` has what and in which order.
        verify: "stitched" holds the finished answer against plain decoding of the text as it is read, in one further
            pass over prompt and answer. The output's `agreement` says for every thread which share of its tokens plain
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

        Raises ValueError or NotImplementedError, in one sentence and before any work, for what cannot be combined; and
        ValueError in mid-run where logits processors leave no token to choose, or keep state that threads would mix up.
        """
        arguments = _callers_arguments()
        streamer, tokenizer = self._streamer, arguments.get("tokenizer")
        if streamer is None and arguments.get("streamer") is not None:
            streamer = EndedOnce(arguments["streamer"])
        with ended_on_error(streamer):
            return self._answer(
                *(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs),
                Asked(fork, fork_if, max_threads, max_depth, seed, events, verify, regenerate_below, stop_strings),
                *(streamer, self.tokenizer if tokenizer is None else tokenizer, arguments),
            )

    def _answer(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        asked: Asked,
        streamer: EndedOnce | None,
        tokenizer: Any,
        arguments: dict[str, Any],
    ) -> MedusaAparOutput | torch.Tensor:
        processors = logits_processor
        checks.check_call(self, model, input_ids, generation_config, processors, model_kwargs, arguments)
        if not self._fits:
            self._fit()
        prompts = checks.unpadded(input_ids, model_kwargs.get("attention_mask"))
        checks.check_limits(max_threads=asked.max_threads, max_depth=asked.max_depth)
        max_depth = self.max_depth if asked.max_depth is None else asked.max_depth
        mode, fork_if = fork_mode(self.fork if asked.fork is None else asked.fork), asked.fork_if
        checks.check_asked(self, generation_config, fork_if, mode)
        if mode == "auto" and self.control_token_ids is None:
            mode = "off"
        policy = fork_policy(mode, fork_if, max_depth, tokenizer)
        max_new_tokens, eos_ids, criteria = Ends.of(
            stopping_criteria, generation_config, input_ids.shape[1], one_thread=mode == "off"
        )
        if asked.stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate or attach.")
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=asked.stop_strings))
        seed, verify, regenerate_below = asked.seed, asked.verify, asked.regenerate_below
        last = last_limit(max_new_tokens, regenerate_below)
        checks.check_lengths(self, prompts, last, policy.hidden(last, max_depth))
        if generation_config.do_sample and seed is None:
            seed = int(torch.randint(2**62, (), dtype=torch.long, device="cpu"))
        returns_dict = bool(generation_config.return_dict_in_generate)
        checks.check_verified(self, generation_config, verify, regenerate_below, mode, streamer, criteria)
        first = first_limit(max_new_tokens, regenerate_below)
        scores: dict[Thread, list[torch.Tensor]] | None = (
            {} if returns_dict and generation_config.output_scores else None
        )
        requests = self._requests(input_ids, prompts, Ends(first, eos_ids, criteria), scores)
        decoder = self._decoder(
            requests,
            Verifier(
                control=self.control_token_ids,
                fork=mode == "auto",
                max_depth=max_depth,
                processors=processors,
                seed=seed if generation_config.do_sample else None,
                keep_scores=scores is not None,
                keep_logits=returns_dict and bool(generation_config.output_logits),
                argmax=self.runtime.argmax,
                in_one_launch=self.runtime.verify,
                fork_if=fork_if if mode == "auto" else None,
                # Greedy decoding is temperature 0, where Medusa accepts the likeliest token and no other.
                typical=self.typical if generation_config.do_sample else None,
            ),
            policy,
            asked.max_threads or self.max_threads,
        )
        if scores is not None:
            decoder.scores = scores
        columns = TextColumns(requests, int(generation_config._pad_token_tensor or 0))
        reporter = None
        if returns_dict or asked.events is not None:
            reporter = decoder.reporter = Reporter(requests, asked.events, returns_dict, max_new_tokens)
        if self._streamer is not None:  # a streamer of `model.generate` has seen it
            self._streamer.put(input_ids.cpu())
        for _ in decoder.run():
            if streamer is not None:
                for column in columns.new():
                    streamer.put(column)
            if reporter is not None:
                reporter.deliver()
        if streamer is not None:
            streamer.end()
        self._remark(decoder, max_new_tokens, generation_config)
        decoder.reporter = None  # what the stitcher decodes is no part of the call's own steps
        agreement = Stitcher(decoder, max_new_tokens, regenerate_below).run() if verify else None
        sequences = torch.cat([input_ids, columns.text().to(input_ids.device)], dim=1)
        if not returns_dict:
            return sequences
        assert reporter is not None
        output = MedusaAparOutput(
            sequences=sequences,
            scores=columns.gather(decoder.scores) if decoder.verifier.keep_scores else None,
            logits=columns.gather(decoder.logits) if decoder.verifier.keep_logits else None,
            stats=decoder.stats,
            paragraph_tree=[request.tree for request in requests],
            agreement=agreement,
            events=reporter.events,
        )
        output.tokenizer = tokenizer
        return output

    def _remark(self, decoder: Decoder, max_new_tokens: int, config: GenerationConfig) -> None:
        """Warnings about a call that has run."""
        if sentence := checks.cut_short(self.model, decoder.requests, max_new_tokens):
            logger.warning(sentence)
        # A hot sample, and processors that the heads know nothing of, make good heads look bad.
        if not decoder.verifier.before and not (config.do_sample and (config.temperature or 1.0) > 1):
            draft_watch.watch(self.runtime, decoder.stats, unembedding_size(self.model)[0])

    def _requests(
        self,
        input_ids: torch.Tensor,
        prompts: list[list[int]],
        ends: Ends,
        scores: dict[Thread, list[torch.Tensor]] | None,
    ) -> list[Request]:
        control = self.control_token_ids
        seen: Counter = Counter()
        requests = []
        for row, (row_ids, prompt) in enumerate(zip(input_ids.tolist(), prompts, strict=True)):
            # Equal prompts (num_return_sequences) get noise of their own, whatever else is in the batch.
            key = thread_key(prompt, seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
            tree = ParagraphTree(prompt, key, ends.eos_ids)
            if control is not None:
                tree.fork_id, tree.child_id = control.fork_id, control.child_id
            limits = ends.max_new_tokens, ends.criteria, input_ids.device, scores
            requests.append(Request(row, len(prompts), row_ids, prompt, tree, *limits))
        return requests

    def _decoder(
        self, requests: list[Request], verifier: Verifier, policy: NoForks, max_threads: int | None
    ) -> Decoder:
        speculation, control = self.speculation, self.control_token_ids
        cost = self.cost
        if cost is None and self.budget is None and speculation is not None:
            cost = known_cost(self.model, self.runtime, self.heads, self.draft_tree)
        rows = _BUDGET.get(device_of(self.model).type, _BUDGET["cpu"]) if self.budget is None else self.budget
        if speculation is None:
            budget: Any = EvenBudget(0, DraftTree([]))
        elif speculation.plan == "even":
            budget = EvenBudget(rows, self.draft_tree, cost)
        else:
            budget = ForestBudget(rows, cost, self.runtime.most_nodes, speculation.worths)
        ledger = SlotLedger(self.runtime.pool(self.pool_slots))
        context = context_length(self.model)
        return Decoder(
            model=self.model,
            heads=self.heads,
            runtime=self.runtime,
            scheduler=Scheduler(ledger, budget, max_threads, context),
            verifier=verifier,
            fork_manager=ForkManager(ledger, context, policy, verifier.max_depth),
            requests=requests,
            speculation=speculation or Speculation.even(),
            draft_tree=self.draft_tree,
            proposer=Proposer() if control is None else Proposer(control.fork_id, control.child_id),
        )


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


def _state(model: PreTrainedModel) -> tuple:
    """What a runtime is picked by, as far as it changes with a word (`model.half()`, `model.train()`)."""
    return model.dtype, model.training, device_of(model)


class Asked(NamedTuple):
    """What `MedusaApar.__call__` takes beside what transformers prepares."""

    fork: bool | str | None
    fork_if: ForkIf | None
    max_threads: int | None
    max_depth: int | None
    seed: int | None
    events: Consumer | None
    verify: str | None
    regenerate_below: float | None
    stop_strings: str | list[str] | None


def _callers_arguments() -> dict[str, Any]:
    """What `model.generate` itself was called with; nothing where it was not.

    transformers keeps some of it from a callable `custom_generate`: a streamer, whose reader would wait for ever, a
    tokenizer, an assistant model. They are fetched from the frames that call us. `generate` takes the tokenizers out
    of its own `kwargs`, but torch.no_grad, which wraps it, has them still.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        frame = cast(Any, frame.f_back)
    if frame is None:
        return {}
    wrapped = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    return dict(wrapped if isinstance(wrapped, dict) else {}) | dict(frame.f_locals)


def attach(
    model: PreTrainedModel,
    heads: DraftHeads | str | Path | None = None,
    apar: ControlTokens | str | Path | tuple[int, int] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    speculation: Speculation | str | None = None,
    fork: bool | str = "auto",
    draft_tree: DraftTree | None = None,
    budget: int | None = None,
    step_cost: StepCost | None = None,
    max_threads: int | None = None,
    max_depth: int | None = None,
    attention: str = "auto",
    cuda_graphs: bool | None = None,
    runtime: str = "auto",
    quantize: str | None = None,
    pool_slots: int | None = None,
    acceptance: str | TypicalAcceptance = "exact",
) -> MedusaApar:
    """Readies a causal language model of transformers for `custom_generate=`; the model itself is not changed.

    Args:
        heads: Medusa or Hydra heads trained for this model, or where they lie. None guesses from n-grams alone: what
            followed the same words in the prompt and in the answer's threads.
        apar: control tokens of an APAR-tuned model, as `ControlTokens`, a directory with `apar_config.json`, or
            (fork id, child id); None never forks.
        tokenizer: only needed for `stop_strings` and `fork="lists"`.
        speculation: what is guessed ahead and how a step's nodes are chosen: a `Speculation`, "forest" or "even" (its
            two plans with all, or none, of what goes with them), or "off", which decodes one token per thread and step.
            By default "forest", and "even" where heads come with a `draft_tree`.
        fork: where answers split unless a call says otherwise; `generate` has what it can be.
        draft_tree: which of the heads' guesses can become nodes (default: the likeliest by measured acceptance).
        budget: rows of a step's forest, threads' roots included, to be filled (default: at most 24 on a CPU and 64 on a
            GPU, and no more than pay).
        step_cost: what a step costs by its rows, for judging what pays (default: measured once on this device for this
            model and kept in the cache folder).
        max_threads: most threads of a request that run in one step; the others wait (None: no limit).
        max_depth: threads at this depth (the trunk has 0) do not fork (default: as deep as the model was tuned).
        attention: the torch runtime's, which a name asks for: "sdpa" attends with masks, "triton" with kernels; "auto"
            takes the kernels on a GPU.
        cuda_graphs: whether steps over "triton" run as CUDA graphs (None: on a GPU).
        runtime: "torch" runs transformers' modules, "cpu" compiled code for a model built like Llama on a CPU; "auto"
            takes the second where it can.
        quantize: "int8" rounds the weights to 8 bits, a scale per output and 64 inputs, those of the heads too, and the
            KV pool to 16 (CPU runtime only; the model keeps its own).
        pool_slots: most KV slots ever in use (None: grows on demand). Under pressure threads wait or are evicted and
            fed again later, which never changes a token.
        acceptance: of drafted tokens in sampling. "exact" keeps those alone that would have been sampled anyway.
            "typical" is Medusa's lossy rule, and `TypicalAcceptance(epsilon, delta)` the same with other thresholds: of
            the drafted paths whose every token is likely enough after temperature, top-p and the like, the longest is
            kept, and of equally long ones the likeliest. The token behind it is sampled (Medusa takes the likeliest),
            so that nothing drafted is plain sampling. More is accepted, but the text leans to what the heads like, is
            no sample of the model's distribution any more, and varies with heads, budget and whatever else decides
            what is drafted. Control tokens are banned as ever. Greedy decoding is exact in either case: Medusa treats
            it as temperature 0, where the likeliest token alone is accepted.

    Raises ValueError or NotImplementedError, in one sentence, for a model this cannot work with, heads of another
    model, or control tokens the model lacks.
    """
    check_model(model)
    typical = checks.typical_acceptance(acceptance)
    pick = partial(pick_runtime, model, runtime, quantize, attention, cuda_graphs)
    chosen = pick()
    if isinstance(heads, (str, Path)):
        heads = load_heads(heads, model)
    if isinstance(apar, tuple):
        apar = ControlTokens(*apar)
    elif isinstance(apar, (str, Path)):
        apar = ControlTokens.from_pretrained(apar)
    if heads is not None:
        heads.check_matches(model)
    if apar is not None:
        apar.check_matches(unembedding_size(model)[0])
    if max_depth is None:
        max_depth = DEFAULT_MAX_DEPTH if apar is None else apar.max_depth
    checks.check_limits(budget=budget, max_depth=max_depth, max_threads=max_threads, pool_slots=pool_slots)
    default = Speculation.even() if heads is not None and draft_tree is not None else Speculation()
    if speculation is None and heads is None:
        _say_once(
            f"{type(model).__name__} has no draft heads: drafting from n-grams of the prompt and the answer "
            "(speculation='off' disables it)."
        )
    speculation = default if speculation is None else Speculation.named(speculation)
    fork = fork_mode(fork)
    if draft_tree is None:
        size = budget or _BUDGET.get(device_of(model).type, _BUDGET["cpu"])
        if speculation is not None and speculation.plan == "forest":
            size = _CANDIDATES
        size = size if chosen.most_nodes is None else min(size, chosen.most_nodes)
        draft_tree = DraftTree.likeliest(size, checks.expected_acceptance(heads))
    elif chosen.most_nodes is not None and len(draft_tree) > chosen.most_nodes:
        raise ValueError(f"the draft tree has {len(draft_tree)} nodes; attention='triton' takes {chosen.most_nodes}.")
    elif heads is not None and draft_tree.num_heads > heads.num_heads:
        raise ValueError(f"The draft tree is {draft_tree.num_heads} deep but there are {heads.num_heads} Medusa heads.")
    return MedusaApar(
        *(model, heads, apar, tokenizer, draft_tree, budget, max_threads, max_depth, chosen, pool_slots),
        cost=step_cost,
        speculation=speculation,
        typical=typical,
        fork=fork,
        pick=pick,
    )
