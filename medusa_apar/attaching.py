"""`attach`: what readies a model of transformers for `custom_generate=`."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.options import EngineOptions
from medusa_apar.heads import DraftHeads, load_heads
from medusa_apar.models.families import check_model, unembedding_size
from medusa_apar.runtimes.devices import device_of
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.said import say_once
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH, ControlTokens
from medusa_apar.threads.fork_policy import fork_mode
from medusa_apar.triton_kernels.reference import TypicalAcceptance

from . import checks
from .generate import MedusaApar

logger = logging.getLogger(__name__)

_CANDIDATES = 32  # guesses of the heads below each root, at most, among which a forest's nodes are chosen


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
        heads: Medusa or Hydra heads or an EAGLE-3 drafter trained for this model, or where they lie: a folder, file or
            Hub id. None guesses from n-grams alone: what followed the same words in the prompt and in the answer's
            threads.
        apar: control tokens of an APAR-tuned model, as `ControlTokens`, a directory with `apar_config.json`, or
            (fork id, child id); None never forks.
        tokenizer: only needed for `stop_strings` and `fork="lists"`.
        speculation: what is guessed ahead and how a step's nodes are chosen: a `Speculation`, "forest" or "even" (its
            two plans, with all of what goes with them but recycled tokens, or with none of it), or "off", which decodes
            one token per thread and step. By default "forest", and "even" where heads come with a `draft_tree`.
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
        runtime: "torch" runs transformers' modules, "cpu" compiled code for a model of a known family on a CPU; "auto"
            takes the second where it can.
        quantize: "int8" rounds weights to 8 bits, a scale per output and 64 inputs, those of the heads too, activations
            likewise, and the KV pool to 16 (CPU runtime only; the model keeps its own).
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
    if isinstance(heads, (str, Path)):
        heads = load_heads(heads, model)
    pick = partial(pick_runtime, model, runtime, quantize, attention, cuda_graphs)
    chosen = pick()
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
        say_once(
            logger,
            f"{type(model).__name__} has no draft heads: drafting from n-grams of the prompt and the answer "
            "(speculation='off' disables it).",
        )
    speculation = default if speculation is None else Speculation.named(speculation)
    fork = fork_mode(fork)
    most = chosen.facts.max_nodes
    if draft_tree is None:
        size = budget or EngineOptions().max_rows(device_of(model).type)
        if speculation is not None and speculation.plan == "forest":
            size = _CANDIDATES
        size = size if most is None else min(size, most)
        draft_tree = DraftTree.likeliest(size, checks.expected_acceptance(heads))
    elif most is not None and len(draft_tree) > most:
        raise ValueError(f"the draft tree has {len(draft_tree)} nodes; attention='triton' takes {most}.")
    elif heads is not None and draft_tree.num_heads > heads.num_heads:
        raise ValueError(f"The draft tree is {draft_tree.num_heads} deep but there are {heads.num_heads} Medusa heads.")
    options = EngineOptions(speculation, draft_tree, budget, step_cost, pool_slots)
    return MedusaApar(
        *(model, heads, apar, tokenizer, options, max_threads, max_depth, chosen),
        typical=typical,
        fork=fork,
        pick=pick,
    )
