"""medusa-apar: parallel answer threads (APAR) and speculative heads (Medusa) in one forward pass.

    import medusa_apar
    apar = medusa_apar.load("smollm2-135m")
    apar.generate(**apar.tokenizer("...", return_tensors="pt"), max_new_tokens=256)

or, for a model you already have: `model.generate(**inputs, custom_generate=medusa_apar.attach(model, heads=...))`.
"""

from pathlib import Path

# In a bare checkout the mapped packages (heads/, triton_kernels/, eval/) lie beside this folder; see setup.py.
if (Path(__file__).parent.parent / "setup.py").exists():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

from .control_tokens import ControlTokens  # noqa: E402
from .draft_tree import DraftTree  # noqa: E402
from .generate import MedusaApar, attach  # noqa: E402

__all__ = ["ControlTokens", "DraftTree", "MedusaApar", "attach", "__version__"]
