"""A plan in the making: experts of a ranking, what was left out and why, and what to know of it.

Every strategy fills a `Draft`; so all their plans tell in the same words where they come from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer, check_shape
from moescope.steering.plan import Intervention, SteeringPlan, TokenScope
from moescope.steering.ranked import RANK_COLUMNS, RankedExpert, rank_experts, router_of


class CommonOptions(TypedDict, total=False):
    """What every strategy takes beside its own parameters.

    Attributes:
        rank_by: the column to rank by; by default the strategy's.
        confirmed_only: take only experts whose effect was confirmed; by default where the table
            says which are (not for `esft` and `keep`).
        value: of a table that is split by a field, the rows of this value.
        layer_range: first and last decoder layer of the plan, both included.
        tokens: scope of the interventions.
        name: of the plan; by default the strategy's.
        model: of the plan.
        provenance: where the table comes from; what was chosen and left out is added.
    """

    rank_by: str | None
    confirmed_only: bool | None
    value: str | None
    layer_range: tuple[int, int] | None
    tokens: TokenScope
    name: str | None
    model: str | None
    provenance: Mapping[str, Any] | None


class Draft:
    """Collects the interventions of one plan.

    Attributes:
        ranking: the table's experts.
        layers: the model's routed layers, or None.
    """

    def __init__(
        self,
        strategy: str,
        source: str,
        frame: pd.DataFrame,
        layers: Sequence[RoutedLayer] | None,
        parameters: Mapping[str, Any],
        common: CommonOptions,
        *,
        wanted: Sequence[str] = RANK_COLUMNS,
    ) -> None:
        """Rank the table; raises PlanError where it cannot be."""
        known = CommonOptions.__annotations__
        if unknown := [name for name in common if name not in known]:
            raise PlanError(f"strategy {strategy!r} has no parameter {unknown[0]!r}")
        self.strategy = strategy
        self.source = source
        self.layers = layers
        self.ranking = rank_experts(
            frame,
            layers=layers,
            rank_by=common.get("rank_by"),
            wanted=wanted,
            confirmed_only=common.get("confirmed_only"),
            value=common.get("value"),
            layer_range=common.get("layer_range"),
        )
        self._common = common
        self._parameters = dict(parameters)
        self._chosen: list[dict[str, Any]] = []
        self._left_out: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._interventions: list[Intervention] = []
        self._kinds: dict[int, set[str]] = defaultdict(set)
        for layer, kinds in self.ranking.kinds.items():
            self._kinds[layer].update(kinds)
        for router in layers or ():
            self._kinds[router.layer].add(router.kind)

    def router(self, one: RankedExpert) -> RoutedLayer | None:
        """The router of an expert, where the model is known."""
        return None if self.layers is None else router_of(one.layer, one.kind, self.layers)

    def first(
        self, ranked: Sequence[RankedExpert], number: int, done: str, which: str
    ) -> list[RankedExpert]:
        """The first experts of a list that is long enough.

        Args:
            ranked: the experts that may be taken.
            number: how many are asked for.
            done: what happens to them, for the message.
            which: what they have in common, for the message.

        Raises:
            PlanError: there are fewer.
        """
        if number < 0:
            raise PlanError(f"{number} experts are to be {done}; the number is at least 0")
        if len(ranked) < number:
            raise PlanError(
                f"{number} experts are to be {done}, but the table has {len(ranked)} "
                f"{self.ranking.noun} {which}; ask for at most {len(ranked)}"
            )
        return list(ranked[:number])

    def at_most_k(self, experts: Sequence[RankedExpert]) -> list[RankedExpert]:
        """As many of a router's experts as it selects per token; the others are left out.

        They are not replaced by the next ones: the plan then does what its numbers say, but for
        those that it names as left out.
        """
        taken: dict[tuple[int, str | None], int] = defaultdict(int)
        kept = []
        for one in experts:
            router = self.router(one)
            if router is not None and taken[one.router] >= router.top_k:
                self.leave_out(
                    one,
                    f"{router.top_k} experts of this layer are forced already, as many as a token "
                    "selects",
                )
                continue
            taken[one.router] += 1
            kept.append(one)
        return kept

    def require_k_left(self, masked: Sequence[RankedExpert]) -> None:
        """Refuse masks that leave fewer experts than a token selects."""
        for router, left in self._fewer_than_k(masked):
            raise PlanError(
                f"{router.num_experts - left} of the {router.num_experts} experts of layer "
                f"{router.layer} are to be masked, which leaves {left}, but {router.top_k} are "
                "selected per token; ask for fewer (only strategy 'steermoe' lets masked experts "
                "fill up)"
            )

    def tell_filled_up(self, masked: Sequence[RankedExpert]) -> None:
        """Tell where masked experts will fill up slots, because too few others are left."""
        for router, left in self._fewer_than_k(masked):
            self.note(
                f"layer {router.layer} keeps {left} of {router.num_experts} experts and selects "
                f"{router.top_k} per token, so masked experts take the other slots, as in the paper"
            )

    def _fewer_than_k(self, masked: Sequence[RankedExpert]) -> Iterator[tuple[RoutedLayer, int]]:
        """The known routers that masks leave fewer experts than they select, with how many."""
        by_router: dict[tuple[int, str | None], list[RankedExpert]] = defaultdict(list)
        for one in masked:
            by_router[one.router].append(one)
        for experts in by_router.values():
            router = self.router(experts[0])
            if router is None:
                continue
            left = router.num_experts - len(experts)
            if left < router.top_k:
                yield router, left

    def add(self, experts: Sequence[RankedExpert], **settings: Any) -> None:
        """One intervention per router, with these settings, on these experts."""
        by_router: dict[tuple[int, str | None], list[int]] = defaultdict(list)
        for one in experts:
            by_router[one.router].append(one.expert)
            self._chosen.append(_row(one) | {"value": one.value, "action": settings["action"]})
        for (layer, kind), ids in sorted(by_router.items(), key=_by_place):
            self._add(layer, kind, ids, settings)

    def add_ids(self, router: RoutedLayer, experts: Sequence[int], **settings: Any) -> None:
        """One intervention on experts that the table need not hold."""
        self._add(router.layer, router.kind, experts, settings)

    def leave_out(self, one: RankedExpert, reason: str) -> None:
        """Tell that an expert was asked for and is not in the plan."""
        self._left_out.append(_row(one) | {"value": one.value, "reason": reason})

    def note(self, text: str) -> None:
        """Tell what whoever uses the plan should know."""
        self._notes.append(text)

    def plan(self) -> SteeringPlan:
        """The plan, checked against the layers if they are known.

        Raises:
            PlanError: it has no interventions, or does not fit the layers.
        """
        if not self._interventions:
            raise PlanError(f"strategy {self.strategy!r} was asked for no experts; ask for some")
        if self._left_out:
            self.note(
                f"{len(self._left_out)} experts that were asked for are left out and not replaced; "
                "see left_out"
            )
        if self.layers is None:
            self.note("made without the model's layers: how many experts fit was not checked")
        plan = SteeringPlan(
            name=self._common.get("name") or self.strategy,
            model=self._common.get("model"),
            provenance={
                **(self._common.get("provenance") or {}),
                "strategy": self.strategy,
                "source": self.source,
                "parameters": self._parameters | _told(self._common),
                "ranked_by": self.ranking.column,
                "confirmed_only": self.ranking.confirmed_only,
                "chosen": self._chosen,
                "left_out": self._left_out,
                "notes": self._notes,
                "capped": self.layers is not None,
            },
            interventions=self._interventions,
        )
        if self.layers is not None:
            check_shape(plan, self.layers)
        return plan

    def _add(
        self, layer: int, kind: str | None, experts: Sequence[int], settings: Mapping[str, Any]
    ) -> None:
        self._interventions.append(
            Intervention(
                layer=layer,
                # Named only where it is needed, so that plans stay short.
                kind=kind if len(self._kinds[layer]) > 1 else None,
                experts=sorted(experts),
                tokens=self._common.get("tokens", "all"),
                **settings,
            )
        )


def _row(one: RankedExpert) -> dict[str, Any]:
    kind = {} if one.kind is None else {"kind": one.kind}
    return {"layer": one.layer, **kind, "expert": one.expert}


def _told(common: CommonOptions) -> dict[str, Any]:
    """The common options that decide which experts are chosen, where they were given."""
    told: dict[str, Any] = {}
    if (value := common.get("value")) is not None:
        told["value"] = value
    if (span := common.get("layer_range")) is not None:
        told["layer_range"] = list(span)
    return told


def _by_place(item: tuple[tuple[int, str | None], list[int]]) -> tuple[int, str]:
    (layer, kind), _ = item
    return (layer, kind or "")
