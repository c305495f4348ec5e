"""medusa-apar: parallel answer threads (APAR) and speculative heads (Medusa) in one forward pass.

    import medusa_apar
    apar = medusa_apar.load("smollm2-135m")
    apar.generate(**apar.tokenizer("...", return_tensors="pt"), max_new_tokens=256)

or, for a model you already have: `model.generate(**inputs, custom_generate=medusa_apar.attach(model, heads=...))`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a bare checkout the mapped packages (heads/, triton_kernels/, eval/) lie beside this folder; see setup.py.
if (Path(__file__).parent.parent / "setup.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medusa_apar.drafting.draft_tree import DraftTree as DraftTree
    from medusa_apar.drafting.options import Speculation as Speculation
    from medusa_apar.drafting.step_cost import StepCost as StepCost
    from medusa_apar.threads.control_tokens import ControlTokens as ControlTokens
    from medusa_apar.triton_kernels.reference import TypicalAcceptance as TypicalAcceptance

    from . import display as display
    from . import events as events
    from . import heads as heads
    from .generate import MedusaApar as MedusaApar
    from .generate import attach as attach
    from .loading import load as load

# Imported on first use: torch and transformers take seconds, `medusa-apar --help` should not.
_EXPORTS = {
    "ControlTokens": "threads.control_tokens",
    "DraftTree": "drafting.draft_tree",
    "MedusaApar": "generate",
    "Speculation": "drafting.options",
    "StepCost": "drafting.step_cost",
    "TypicalAcceptance": "triton_kernels.reference",
    "attach": "generate",
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
