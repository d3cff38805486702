"""Requested against achieved routing: whether steering did what the plan asks.

One request is one token and one expert. It is counted from the expert ids that the steered router
handed on, never from the plan; padding is left out where the attention mask is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moescope.steering.plan import Intervention, SteeringPlan, TokenScope

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AchievedRouting:
    """What became of one intervention.

    Attributes:
        number: of the intervention in the plan, from 1.
        requested: tokens in scope times experts.
        achieved: requests that held: the masked expert was not selected, the forced one was.
        held_anyway: requests that the router's own choice, on the same input, met already.
    """

    number: int
    action: str
    setting: str
    layer: int
    kind: str
    experts: tuple[int, ...]
    tokens: str
    requested: int
    achieved: int
    held_anyway: int

    @property
    def share(self) -> float | None:
        """Achieved of requested, or None where no token was in scope."""
        return self.achieved / self.requested if self.requested else None


class SteeringReport:
    """What steering has done so far; `steer` yields it and keeps it up to date.

    Attributes:
        plan: the plan applied.
        num_forwards: forwards of the model so far.
    """

    def __init__(self, plan: SteeringPlan, kinds: Sequence[str]) -> None:
        """A report of nothing yet; `kinds` are the router kinds of the interventions."""
        self.plan = plan
        self.num_forwards = 0
        self._kinds = tuple(kinds)
        self._counts = [_Counts() for _ in plan.interventions]

    @property
    def rows(self) -> list[AchievedRouting]:
        """One row per intervention, in the plan's order."""
        return [self._row(number) for number in range(1, len(self.plan.interventions) + 1)]

    @property
    def share(self) -> float | None:
        """Achieved of requested over the whole plan, or None where nothing was requested."""
        rows = self.rows
        requested = sum(row.requested for row in rows)
        return sum(row.achieved for row in rows) / requested if requested else None

    def frame(self) -> pd.DataFrame:
        """The rows as a table, with the column `share`."""
        import pandas as pd

        names = [*AchievedRouting.__annotations__, "share"]
        return pd.DataFrame(
            [asdict(row) | {"share": row.share} for row in self.rows], columns=names
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "plan_id": self.plan.plan_id,
            "num_forwards": self.num_forwards,
            "share": self.share,
            "interventions": [asdict(row) | {"share": row.share} for row in self.rows],
        }

    def count(
        self, number: int, *, requested: Tensor, achieved: Tensor, held_anyway: Tensor
    ) -> None:
        """Add what one forward did; the counts stay on their device until they are read."""
        found = self._counts[number - 1]
        found.requested += requested
        found.achieved += achieved
        found.held_anyway += held_anyway

    def _row(self, number: int) -> AchievedRouting:
        intervention: Intervention = self.plan.interventions[number - 1]
        counts = self._counts[number - 1]
        return AchievedRouting(
            number=number,
            action=intervention.action,
            setting=intervention.setting,
            layer=intervention.layer,
            kind=self._kinds[number - 1],
            experts=intervention.experts,
            tokens=scope_in_words(intervention.tokens),
            requested=int(counts.requested),
            achieved=int(counts.achieved),
            held_anyway=int(counts.held_anyway),
        )


@dataclass
class _Counts:
    """Sums over forwards, as tensors where anything was counted."""

    requested: Tensor | int = 0
    achieved: Tensor | int = 0
    held_anyway: Tensor | int = 0


def scope_in_words(scope: TokenScope) -> str:
    """`all`, ..., or `first 8 generated`."""
    return scope if isinstance(scope, str) else f"first {scope.first_generated} generated"
