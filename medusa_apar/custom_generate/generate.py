"""`model.generate(custom_generate="<folder or Hub repository>", trust_remote_code=True)`, with medusa-apar installed.

The same decoder as the callable form, as transformers' Hub convention wants it: one function that is given all of
`generate`'s arguments. `heads`, `apar` and the other options of `medusa_apar.attach` are passed along with them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import medusa_apar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OPTIONS = [name for name in inspect.signature(medusa_apar.attach).parameters if name not in ("model", "tokenizer")]


def generate(model: PreTrainedModel, **kwargs: Any) -> Any:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    apar = medusa_apar.attach(model, tokenizer=kwargs.get("tokenizer"), **options)
    return apar.generate(**kwargs)
