"""What may be guessed ahead, and how a step's nodes are chosen among it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speculation:
    """None of it changes a token, only when it is made.

    plan: "forest" spends one budget on the nodes that bring the answers most, whichever thread they hang under; "even"
        gives every thread the same tree, as Medusa does.
    thread_weights: with "forest", nodes of threads that the answer does not wait for earn half.
    ngrams: where the prompt or a thread of the answer has written the same tokens before, what followed them is
        proposed beside the heads' drafts, and without heads too.
    forks: below a proposed `[Fork]` its `[Child]` runs in the same step, so that a fork costs none.
    recycling: what the model said last time behind the same one or two tokens is proposed too.
    """

    plan: str = "forest"
    thread_weights: bool = True
    ngrams: bool = True
    forks: bool = True
    recycling: bool = False

    def __post_init__(self) -> None:
        if self.plan not in ("forest", "even"):
            raise ValueError(f'speculation plans "forest" or "even", not {self.plan!r}.')
        if self.plan == "even" and (self.thread_weights or self.ngrams or self.forks or self.recycling):
            raise ValueError("an even plan takes the heads' guesses alone: use Speculation.even().")

    @classmethod
    def even(cls) -> Speculation:
        """Medusa's: the heads' guesses alone, the same tree below every thread."""
        return cls("even", thread_weights=False, ngrams=False, forks=False)

    @classmethod
    def named(cls, name: Speculation | str) -> Speculation | None:
        """What `attach(speculation=...)` may be given; None guesses nothing. ValueError for any other name."""
        if isinstance(name, Speculation):
            return name
        if name == "off":
            return None
        if name not in ("forest", "even"):
            raise ValueError(f"speculation={name!r} is not 'forest', 'even', 'off' or a Speculation.")
        return cls.even() if name == "even" else cls(name)
