"""How an engine decodes, whatever its requests ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_apar.drafting.budget import EvenBudget, ForestBudget
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import LearnedCost, StepCost

# Rows of a forest, at most: past these a step's cost grows with every row.
MAX_ROWS = {"cpu": 24, "cuda": 64}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What every request of an engine has in common.

    speculation: what is guessed ahead; None for nothing.
    draft_tree: of the heads' guesses below each root.
    budget: rows of a step's forest, threads' roots included, to be filled; None: at most 24 on a CPU and 64 on a GPU,
        and no more than pay.
    step_cost: what a step costs by its rows; None: measured once on this device, and corrected by the steps that run.
    pool_slots: most KV slots ever in use; None: the pool grows on demand.
    max_prefill_rows: most rows of a step beside those of requests that decode; None: as many as double its time.
    max_requests: most requests that run at once; None: as many as the pool has room for.
    max_waiting: most requests in the queue; one more raises QueueFull. None: any number.
    prefix_cache: whether paths stay in the pool for later requests that begin as they do. They take slots that nobody
        needs: all of a pool with `pool_slots`; without that it grows for them to 4096 slots. It changes no token
        where rows do not round by their neighbours: in float32, and in the compiled CPU step. A `generate` call has an
        engine of its own, which ends with it: there it is off.
    """

    speculation: Speculation | None = None
    draft_tree: DraftTree = field(default_factory=lambda: DraftTree([]))
    budget: int | None = None
    step_cost: StepCost | None = None
    pool_slots: int | None = None
    max_prefill_rows: int | None = None
    max_requests: int | None = None
    max_waiting: int | None = None
    prefix_cache: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("budget", 1),
            ("pool_slots", 1),
            ("max_prefill_rows", 1),
            ("max_requests", 1),
            ("max_waiting", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, must be {least} or more.")

    def max_rows(self, device: str) -> int:
        """Rows of a step's forest, at most, on a device of this type."""
        return MAX_ROWS.get(device, MAX_ROWS["cpu"]) if self.budget is None else self.budget

    def forest_budget(
        self, device: str, cost: StepCost | LearnedCost | None, max_nodes: int | None
    ) -> ForestBudget | EvenBudget:
        """What chooses the nodes of a step's forest. max_nodes: of one thread, as many as the runtime takes."""
        speculation, rows = self.speculation, self.max_rows(device)
        if speculation is None:
            return EvenBudget(0, DraftTree([]))
        if speculation.plan == "even":
            return EvenBudget(rows, self.draft_tree, cost)
        return ForestBudget(rows, cost, max_nodes, speculation.thread_weights)

    def prefill_rows(self, device: str, cost: StepCost | LearnedCost | None) -> int:
        """Where nobody says how many: with a full step's beside them a step takes twice as long as that at most."""
        if self.max_prefill_rows is not None:
            return self.max_prefill_rows
        rows = self.max_rows(device)
        if cost is None:
            return rows
        costs = cost.rows(16 * rows)
        return max(int((costs <= 2 * costs[rows - 1]).sum()) - rows, 1)
