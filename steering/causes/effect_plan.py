"""A plan from a table of single effects: the experts that move a target most, taken out or forced.

Single effects do not add up (`moescope.steering.causes.search` looks for sets); such a plan is the
ranking taken at its word, and the search's plan is to be compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from moescope.probe.errors import PlanError
from moescope.steering.causes.keys import Mode
from moescope.steering.check import RoutedLayer, check_shape
from moescope.steering.plan import SteeringPlan


def plan_from_effects(
    frame: pd.DataFrame,
    count: int,
    direction: Literal["lower", "raise"],
    layers: Sequence[RoutedLayer],
    *,
    action: Literal["mask", "force"] = "mask",
    mode: Mode = "replace",
    name: str | None = None,
    model: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> SteeringPlan:
    """The `count` experts that move the target most in a direction, ties by layer and expert.

    Args:
        frame: `layer`, `kind`, `expert` and `effect` or `estimate`, one row per expert.
        count: how many experts.
        direction: where the target should go.
        layers: the model's routed layers.
        action: what the effects were effects of.
        mode: of the masks.
        name: of the plan.
        model: of the plan.
        provenance: where the table comes from.

    Raises:
        PlanError: fewer experts than that move it this way, or more in one layer than fit.
    """
    column = "effect" if "effect" in frame else "estimate"
    sign = 1.0 if direction == "lower" else -1.0
    ranked = frame.assign(towards=sign * frame[column]).sort_values(
        ["towards", "layer", "expert"], kind="stable"
    )
    ranked = ranked[ranked["towards"] < 0].head(count)
    if len(ranked) < count:
        raise PlanError(
            f"{count} experts are to be taken, but only {len(ranked)} {direction} the target"
        )
    by_router: dict[tuple[int, str], list[int]] = {}
    for row in ranked.to_dict("records"):
        by_router.setdefault((int(row["layer"]), str(row["kind"])), []).append(int(row["expert"]))
    settings: dict[str, Any] = {"mode": mode} if action == "mask" else {}
    plan = SteeringPlan(
        name=name,
        model=model,
        provenance={
            **(provenance or {}), "ranked_by": column, "direction": direction,
            "effects": [
                {"layer": int(row["layer"]), "expert": int(row["expert"]),
                 "effect": float(row[column])}
                for row in ranked.to_dict("records")
            ],
        },
        interventions=[
            {"action": action, "layer": layer, "kind": kind, "experts": sorted(experts), **settings}
            for (layer, kind), experts in sorted(by_router.items())
        ],
    )  # fmt: skip
    check_shape(plan, layers)
    return plan
