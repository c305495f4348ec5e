"""The two ids through which an APAR model speaks to the fork manager (arXiv 2401.06761, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from medusa_apar.json_files import json_object
from medusa_apar.reading import expanded, field

CONFIG_NAME = "apar_config.json"
MODEL_ENTRY = "apar_config"  # the same in a model's own config.json, where transformers' save_pretrained keeps it
DEFAULT_MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """`fork_id` marks where an answer splits, `child_id` is the forced first token of every child thread.

    `max_depth` is how deep the threads were that the model was tuned on: one that has only seen children of the trunk
    does not know what a child's `[Fork]` means.
    """

    fork_id: int
    child_id: int
    max_depth: int = DEFAULT_MAX_DEPTH

    def __post_init__(self) -> None:
        for name in ("fork_id", "child_id", "max_depth"):
            if not isinstance(value := getattr(self, name), Integral) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, must be a whole number.")
            object.__setattr__(self, name, int(value))  # numpy's are none that JSON can hold
        if self.fork_id == self.child_id or min(self.fork_id, self.child_id) < 0:
            raise ValueError(
                f"[Fork] and [Child] need two different non-negative ids, got {self.fork_id} and {self.child_id}."
            )
        if self.max_depth < 0:
            raise ValueError(f"max_depth is {self.max_depth}, must be 0 or more.")

    @property
    def ids(self) -> tuple[int, int]:
        return self.fork_id, self.child_id

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ControlTokens:
        """Reads `apar_config.json`, else what the model's `config.json` keeps of it.

        FileNotFoundError where there is neither, ValueError where it lacks an id.
        """
        if not str(directory).strip():
            raise ValueError("the name of the control tokens' folder is empty.")
        path, model = expanded(directory) / CONFIG_NAME, expanded(directory) / "config.json"
        if path.exists():
            config = json_object(path)
        elif model.is_file() and MODEL_ENTRY in (kept := json_object(model)):
            config, path = field(kept, MODEL_ENTRY, dict, model) or {}, model
        else:
            raise FileNotFoundError(f"{path} does not exist, so the control tokens of this APAR model are unknown.")
        fork, child = (field(config, key, int, path) for key in ("fork_token_id", "child_token_id"))
        if fork is None or child is None:
            raise ValueError(f"{path} does not give fork_token_id and child_token_id, two whole numbers.")
        max_depth = field(config, "max_depth", int, path)
        try:
            return cls(fork, child, DEFAULT_MAX_DEPTH if max_depth is None else max_depth)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def as_config(self) -> dict[str, int]:
        """As `apar_config.json` has it."""
        return {"max_depth": self.max_depth, "fork_token_id": self.fork_id, "child_token_id": self.child_id}

    def check_matches(self, vocab_size: int) -> None:
        if max(self.fork_id, self.child_id) >= vocab_size:
            raise ValueError(
                f"Control tokens {self.fork_id} and {self.child_id} are missing from the model, "
                f"whose vocabulary has {vocab_size} ids."
            )
