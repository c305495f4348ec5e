"""medusa-apar: parallel answer threads (APAR) and speculative heads (Medusa) in one forward pass.

    import medusa_apar
    apar = medusa_apar.load("smollm2-135m")
    apar.generate(**apar.tokenizer("...", return_tensors="pt"), max_new_tokens=256)

or, for a model you already have: `model.generate(**inputs, custom_generate=medusa_apar.attach(model, heads=...))`.

Each folder is a room, and a room imports only from the rows below its own:

    __main__.py       `python -m medusa_apar`
    commands/         the command line: a file a subcommand
    eval/             benchmarks and checks
    serve/            an OpenAI-compatible server over one engine
    attaching.py      `attach`, which readies a model for the drop-in
    generate.py       the drop-in: `MedusaApar.generate`
    call.py           one call of it: rows become requests, and these its output
    facts.py          what requests are made for, whichever engine answers them
    requests.py       what a caller asks for: forking, sampling, limits
    new_request.py    a request of an engine, made of it and checked
    loading.py        `load` and `save_pretrained`
    output.py         what `generate` returns beside the tokens
    checks.py         what is refused before any work is done
    custom_generate/  the drop-in as a folder of transformers' Hub convention
    heads/            draft heads: modules, training, checkpoints, calibration, the weights we ship
    display/          pictures of an answer, drawn from its events
    engine/           requests join and leave it at every step: scheduler, commit, rescoring, stats
    finetune/         from a chat corpus to a model that forks
    events/           what happens in a call: typed events, recordings, text streams
    runtimes/         how a step runs: torch, Triton, or compiled for the CPU
    verify/           from logits to accepted tokens
    forest/           all draft trees of a step in one row, and its masks
    drafting/         what is guessed, and which guesses become nodes
    kv/               KV pool, slot ledger and path table
    models/           where models come from
    threads/          paragraph trees, requests and fork policies; no tensors
    job.py            a long command's log, settings, report and processes
    arguments.py      what subcommands' arguments have in common
    reading.py        files that others wrote, and what is wrong with them
    json_files.py     JSON that others wrote
    said.py           warnings that come once
    triton_kernels/   each kernel beside its torch reference
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a bare checkout the mapped packages (heads/, triton_kernels/, eval/) lie beside this folder; see setup.py.
if (Path(__file__).parent.parent / "setup.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.2.0"

if TYPE_CHECKING:
    from medusa_apar import display as display
    from medusa_apar import events as events
    from medusa_apar import heads as heads
    from medusa_apar.attaching import attach as attach
    from medusa_apar.drafting.draft_tree import DraftTree as DraftTree
    from medusa_apar.drafting.options import Speculation as Speculation
    from medusa_apar.drafting.step_cost import StepCost as StepCost
    from medusa_apar.generate import MedusaApar as MedusaApar
    from medusa_apar.loading import load as load
    from medusa_apar.requests import AnswerOptions as AnswerOptions
    from medusa_apar.requests import Sampling as Sampling
    from medusa_apar.threads.control_tokens import ControlTokens as ControlTokens
    from medusa_apar.triton_kernels.reference import TypicalAcceptance as TypicalAcceptance
    from medusa_apar.verify.guides import Guide as Guide
    from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor as PresenceFrequencyLogitsProcessor

# Imported on first use: torch and transformers take seconds, `medusa-apar --help` should not.
_EXPORTS = {
    "AnswerOptions": "requests",
    "ControlTokens": "threads.control_tokens",
    "DraftTree": "drafting.draft_tree",
    "Guide": "verify.guides",
    "MedusaApar": "generate",
    "PresenceFrequencyLogitsProcessor": "verify.penalties",
    "Sampling": "requests",
    "Speculation": "drafting.options",
    "StepCost": "drafting.step_cost",
    "TypicalAcceptance": "triton_kernels.reference",
    "attach": "attaching",
    "load": "loading",
}
_MODULES = ("display", "events", "heads")  # for `medusa_apar.heads.MedusaHeads` after `import medusa_apar` alone
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
