"""Requested against achieved routing: whether steering did what the plan asks.

Counted from what the steered router handed on, never from the plan; padding is left out where the
attention mask is known. One request is one token and one expert, or one token where an action is on
a router as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moescope.steering.plan import SteeringPlan, TokenScope

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AchievedRouting:
    """What became of one intervention on one layer.

    Attributes:
        number: of the intervention in the plan, from 1.
        requested: tokens in scope, times experts where the action is on experts.
        achieved: requests that held. An expert takes part in a token's output when it has a slot
            with a weight other than 0. `mask`: it takes no part (one that fills up a slot does, so
            it did not hold); `force`: it does; `bias` and
            `scale`: it does, or does not where the value is below 0 (for `scale`: is 0), a push
            that need not succeed; `top_k`: the token has that many slots (dropped ones included);
            `top_p`: the probabilities of its experts reach the value; `replay`: ids and weights
            are the recorded ones.
        held_anyway: requests that the router's own choice, on the same input, met already.
        emptied: tokens whose routed output became 0 because all their experts were dropped.
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
    emptied: int = 0

    @property
    def share(self) -> float | None:
        """Achieved of requested, or None where no token was in scope."""
        return self.achieved / self.requested if self.requested else None

    @property
    def is_promise(self) -> bool:
        """Whether the action promises what is counted; `bias` and `scale` only push towards it."""
        return self.action not in ("bias", "scale")

    @property
    def words(self) -> str:
        """What became of it, in a few words."""
        done = "held" if self.is_promise else "went its way"
        return (
            f"{self.achieved:,} of {self.requested:,} {done}, {self.held_anyway:,} without steering"
        )


@dataclass
class LayerCounts:
    """Sums over forwards for one layer, kept on its device until they are read.

    Attributes:
        layer: decoder layer index.
        kind: which router of that layer.
        numbers: the interventions on it, counted from 1.
        sums: int64[I, 4]: requested, achieved, held anyway, emptied; None before the first.
    """

    layer: int
    kind: str
    numbers: tuple[int, ...]
    sums: Tensor | None = None

    def add(self, counts_I4: Tensor) -> None:
        """Add what one forward did."""
        self.sums = counts_I4 if self.sums is None else self.sums + counts_I4


class SteeringReport:
    """What steering has done so far; `steer` yields it and keeps it up to date.

    Attributes:
        plan: the plan applied.
        num_forwards: forwards of the model so far.
    """

    def __init__(self, plan: SteeringPlan, layers: Sequence[LayerCounts]) -> None:
        """A report that reads these counts."""
        self.plan = plan
        self.num_forwards = 0
        self._layers = tuple(layers)

    @property
    def rows(self) -> list[AchievedRouting]:
        """One row per intervention and layer, in the plan's order."""
        sums: dict[tuple[int, int, str], list[int]] = {}
        for counts, found in zip(self._layers, _read(self._layers), strict=True):
            for number, four in zip(counts.numbers, found, strict=True):
                sums[number, counts.layer, counts.kind] = four
        rows = []
        for number, one in enumerate(self.plan.interventions, start=1):
            here = [key for key in sums if key[0] == number]
            here.sort(key=lambda key: one.on_layers.index(key[1]))
            rows += [
                self._row(number, layer, kind, sums[_, layer, kind]) for _, layer, kind in here
            ]
        return rows

    @property
    def share(self) -> float | None:
        """Achieved of requested over what the plan promises, or None without a request."""
        rows = [row for row in self.rows if row.is_promise]
        requested = sum(row.requested for row in rows)
        return sum(row.achieved for row in rows) / requested if requested else None

    @property
    def emptied(self) -> int:
        """Tokens of a layer whose experts were all dropped."""
        return sum(row.emptied for row in self.rows)

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

    def _row(self, number: int, layer: int, kind: str, sums: list[int]) -> AchievedRouting:
        intervention = self.plan.interventions[number - 1]
        tokens = scope_in_words(intervention.tokens)
        if intervention.prompt_ids is not None:
            tokens += f" of prompts {', '.join(map(str, intervention.prompt_ids))}"
        requested, achieved, held_anyway, emptied = sums
        return AchievedRouting(
            number=number,
            action=intervention.action,
            setting=intervention.setting,
            layer=layer,
            kind=kind,
            experts=intervention.experts,
            tokens=tokens,
            requested=requested,
            achieved=achieved,
            held_anyway=held_anyway,
            emptied=emptied,
        )


def _read(layers: Sequence[LayerCounts]) -> list[list[list[int]]]:
    """The sums of each layer's interventions, moved from each device at once."""
    by_device: dict[Any, list[int]] = {}
    found: list[list[list[int]]] = [[[0] * 4 for _ in counts.numbers] for counts in layers]
    for index, counts in enumerate(layers):
        if counts.sums is not None:
            by_device.setdefault(counts.sums.device, []).append(index)
    for indices in by_device.values():
        import torch

        parts = [layers[index].sums for index in indices]
        moved = torch.cat([part for part in parts if part is not None]).tolist()
        for index in indices:
            count = len(layers[index].numbers)
            found[index], moved = moved[:count], moved[count:]
    return found


def scope_in_words(scope: TokenScope) -> str:
    """`all`, ..., or `first 8 generated`."""
    return scope if isinstance(scope, str) else f"first {scope.first_generated} generated"
