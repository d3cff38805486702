"""Controls of a plan: the same interventions in the same layers on as many other experts.

An effect that random experts have too is none of the experts chosen. Three kinds: drawn at random,
drawn at random among experts of similar load (a plan that hits busy experts disturbs more), and the
bottom of the ranking that the plan was made from. All keep numbers, settings and scopes; only the
experts differ. Interventions on a router as a whole stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.check import RoutedLayer, check_shape, layers_of
from moescope.steering.derive import random_plan
from moescope.steering.interventions import Intervention
from moescope.steering.plan import SteeringPlan
from moescope.steering.ranked import Ranking, rank_experts, router_of

#: From this many experts of nearest load one is drawn.
NUM_NEAREST = 4

_Router = tuple[int, str]


def random_control(plan: SteeringPlan, layers: Sequence[RoutedLayer], seed: int) -> SteeringPlan:
    """Other experts of the same layers, drawn at random: `derive.random_plan`."""
    return random_plan(plan, layers, seed)


def load_matched_control(
    plan: SteeringPlan,
    layers: Sequence[RoutedLayer],
    seed: int,
    load: pd.DataFrame,
    *,
    num_nearest: int = NUM_NEAREST,
    value: str | None = None,
) -> SteeringPlan:
    """Each expert replaced by one of similar load in the same layer that the plan does not name.

    In a layer the plan's experts, in random order, each draw one of the `num_nearest` experts not
    yet drawn whose load is nearest to theirs. How well loads match stands in the provenance.

    Args:
        plan: whose control.
        layers: the model's routed layers.
        seed: of the draws.
        load: `layer`, `expert`, `load` (share of slots, or any measure of it) and perhaps `kind`,
            as `expert_load` gives it.
        num_nearest: how many nearest experts take part in a draw; at 1 only ties are drawn.
        value: of a load table that is split by a field, the rows of this value.

    Raises:
        PlanError: the plan does not fit the layers, or an expert has no load.
    """
    if num_nearest < 1:
        raise PlanError(f"num_nearest is {num_nearest}; it must be at least 1")
    check_shape(plan, layers)
    table = rank_experts(load, layers=layers, rank_by="load", confirmed_only=False, value=value)
    loads = _by_router(table, layers)
    rng = np.random.default_rng(seed)
    pairs: list[dict[str, Any]] = []

    def choose(router: RoutedLayer, own: list[int], others: list[int]) -> dict[int, int]:
        known = loads[router.layer, router.kind]
        if missing := [one for one in (*own, *others) if one not in known]:
            raise PlanError(
                f"the load table has no load of expert {missing[0]} of layer {router.layer}"
            )
        drawn: dict[int, int] = {}
        left = list(others)
        for expert in rng.permutation(own).tolist()[: len(others)]:
            distance = {other: abs(known[other] - known[expert]) for other in left}
            # Equal distances in random order, so that which of them are nearest is a draw too.
            shuffled = rng.permutation(left).tolist()
            nearest = sorted(shuffled, key=distance.__getitem__)[:num_nearest]
            drawn[expert] = int(rng.choice(nearest))
            left.remove(drawn[expert])
        pairs.extend(
            {
                "layer": router.layer, "kind": router.kind, "expert": expert,
                "control": drawn[expert], "load": known[expert],
                "control_load": known[drawn[expert]],
            }
            for expert in sorted(drawn)
        )  # fmt: skip
        return drawn

    exchanged = _exchanged(plan, layers, choose)
    gaps = [abs(pair["load"] - pair["control_load"]) for pair in pairs]
    return exchanged.plan(
        f"load-matched control of {plan.title}, seed {seed}",
        {
            "control": "load-matched",
            "seed": seed,
            "num_nearest": num_nearest,
            "mean_load_difference": float(np.mean(gaps)) if gaps else None,
            "largest_load_difference": max(gaps, default=None),
            "pairs": pairs,
        },
    )


def bottom_control(
    plan: SteeringPlan,
    layers: Sequence[RoutedLayer],
    seed: int,
    ranking: pd.DataFrame,
    *,
    rank_by: str | None = None,
    value: str | None = None,
) -> SteeringPlan:
    """The experts of the same layers that the ranking says least about: the smallest |score|.

    Args:
        plan: whose control.
        layers: the model's routed layers.
        seed: noted only: ties go to the lower expert, nothing is drawn.
        ranking: the table that the plan was made from, unconfirmed experts included.
        rank_by: its column; by default `score`, which all experts have.
        value: of a table that is split by a field, the rows of this value.

    Raises:
        PlanError: the plan does not fit the layers, or too few other experts have a score.
    """
    check_shape(plan, layers)
    table = rank_experts(
        ranking, layers=layers, rank_by=rank_by, confirmed_only=False, value=value,
        wanted=("score", "risk_difference", "delta", "effect"),
    )  # fmt: skip
    scores = _by_router(table, layers)

    def choose(router: RoutedLayer, own: list[int], others: list[int]) -> dict[int, int]:
        known = scores[router.layer, router.kind]
        lowest = sorted(
            (one for one in others if one in known), key=lambda one: (abs(known[one]), one)
        )
        number = min(len(own), len(others))
        if len(lowest) < number:
            raise PlanError(
                f"{number} experts of layer {router.layer} are wanted from the bottom of the "
                f"ranking, but it has a {table.column} of {len(lowest)} that the plan does not name"
            )
        return dict(zip(own, lowest, strict=False))

    return _exchanged(plan, layers, choose).plan(
        f"bottom control of {plan.title}",
        {"control": "bottom", "seed": seed, "draws": False, "ranked_by": table.column},
    )


def with_bottom(
    plan: SteeringPlan,
    layers: Sequence[RoutedLayer],
    ranking: pd.DataFrame,
    *,
    rank_by: str | None = None,
    value: str | None = None,
) -> SteeringPlan:
    """The plan with its bottom control in its provenance, or with why there is none.

    Args:
        plan: made from the ranking.
        layers: the model's routed layers.
        ranking: the table.
        rank_by: its column; see `bottom_control`.
        value: of a table that is split by a field, the rows of this value.
    """
    try:
        control = bottom_control(plan, layers, 0, ranking, rank_by=rank_by, value=value)
        kept: dict[str, Any] = {
            "ranked_by": control.provenance["ranked_by"],
            "interventions": [
                one.model_dump(mode="json", exclude_none=True) for one in control.interventions
            ],
        }
    except PlanError as error:
        kept = {"missing": str(error)}
    provenance = {**plan.provenance, "bottom": kept}
    return plan.model_copy(update={"provenance": provenance})


def known_bottom_control(plan: SteeringPlan, layers: Sequence[RoutedLayer]) -> SteeringPlan | None:
    """The bottom control that the plan's own provenance names, or None.

    It is put there by `with_bottom`.

    Raises:
        PlanError: what stands there does not fit the layers.
    """
    kept: Any = plan.provenance.get("bottom")
    if not isinstance(kept, dict) or not kept.get("interventions"):
        return None
    control = SteeringPlan(
        name=f"bottom control of {plan.title}",
        model=plan.model,
        provenance={
            "control": "bottom", "draws": False, "of": plan.plan_id,
            "ranked_by": kept.get("ranked_by"),
        },
        interventions=kept["interventions"],
    )  # fmt: skip
    check_shape(control, layers)
    return control


@dataclass(frozen=True)
class _Exchanged:
    """A plan with other experts."""

    of: SteeringPlan
    interventions: tuple[Intervention, ...]
    overlap: tuple[dict[str, Any], ...]

    def plan(self, name: str, provenance: Mapping[str, Any]) -> SteeringPlan:
        return SteeringPlan(
            name=name,
            model=self.of.model,
            provenance={
                **provenance,
                "of": self.of.plan_id,
                "excludes_own_experts": not self.overlap,
                "overlap": list(self.overlap),
            },
            interventions=self.interventions,
        )


def _exchanged(
    plan: SteeringPlan,
    layers: Sequence[RoutedLayer],
    choose: Callable[[RoutedLayer, list[int], list[int]], dict[int, int]],
) -> _Exchanged:
    """The plan with each router's experts exchanged, one to one over all interventions.

    `choose` gets a router, the experts that the plan names there, and the others, and pairs as
    many as it can; where others are too few, the unpaired stay and that is told.
    """
    own: dict[_Router, set[int]] = defaultdict(set)
    routers: dict[_Router, RoutedLayer] = {}
    for number, one in enumerate(plan.interventions, start=1):
        for router in layers_of(plan, number, layers):
            own[router.layer, router.kind].update(one.experts)
            routers[router.layer, router.kind] = router
    if not any(own.values()):
        raise PlanError(f"{plan.title} names no experts, so it has no control of other experts")
    drawn: dict[_Router, dict[int, int]] = {}
    overlap = []
    for at in sorted(own):
        experts, router = sorted(own[at]), routers[at]
        others = [one for one in range(router.num_experts) if one not in own[at]]
        pairs = choose(router, experts, others) if experts else {}
        if missing := len(experts) - len(pairs):
            overlap.append({"layer": at[0], "kind": at[1], "num_own_experts": missing})
        drawn[at] = {expert: pairs.get(expert, expert) for expert in experts}
    interventions: list[Intervention] = []
    for number, one in enumerate(plan.interventions, start=1):
        if not one.experts:
            interventions.append(one)
            continue
        for router in layers_of(plan, number, layers):
            replaced = drawn[router.layer, router.kind]
            experts_now = tuple(sorted(replaced[expert] for expert in one.experts))
            change = {"experts": experts_now, "layer": router.layer, "layers": None}
            interventions.append(one.model_copy(update=change))
    return _Exchanged(plan, tuple(interventions), tuple(overlap))


def _by_router(
    table: Ranking, layers: Sequence[RoutedLayer]
) -> Mapping[_Router, Mapping[int, float]]:
    """Router -> expert -> number."""
    found: dict[_Router, dict[int, float]] = defaultdict(dict)
    for one in table.experts:
        router = router_of(one.layer, one.kind, layers)
        found[router.layer, router.kind][one.expert] = one.value
    return found
