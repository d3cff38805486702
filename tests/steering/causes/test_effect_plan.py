"""Plans from tables of single effects: direction, ties, too few, too many in a layer."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import pytest

from moescope.probe.errors import PlanError
from moescope.steering.causes.effect_plan import plan_from_effects
from moescope.steering.check import LayerShape

LAYERS = [LayerShape(0, "mlp", 4, 2), LayerShape(1, "mlp", 4, 2)]
EFFECTS = [-3.0, -1.0, 0.0, 2.0, -1.0, -2.0, 1.0, 0.5]


def table(column: str = "effect") -> pd.DataFrame:
    rows = [(layer, "mlp", expert) for layer in range(2) for expert in range(4)]
    frame = pd.DataFrame(rows, columns=["layer", "kind", "expert"])
    return frame.assign(**{column: EFFECTS})


@pytest.mark.parametrize("column", ["effect", "estimate"])
@pytest.mark.parametrize(
    ("direction", "count", "taken"),
    [
        ("lower", 1, {0: [0]}),
        ("lower", 3, {0: [0, 1], 1: [1]}),  # of two equal ones the lower layer's
        ("raise", 2, {0: [3], 1: [2]}),
    ],
)
def test_the_experts_that_move_the_target_most_are_taken(
    column: str, direction: Literal["lower", "raise"], count: int, taken: dict[int, list[int]]
) -> None:
    plan = plan_from_effects(table(column), count, direction, LAYERS, mode="drop")
    found = {one.layer: list(one.experts) for one in plan.interventions}
    assert found == taken
    assert {one.action for one in plan.interventions} == {"mask"}
    assert all(getattr(one, "mode", None) == "drop" for one in plan.interventions)
    assert len(plan.provenance["effects"]) == count  # type: ignore[arg-type]


def test_forced_experts_are_forced() -> None:
    plan = plan_from_effects(table(), 1, "raise", LAYERS, action="force")
    (one,) = plan.interventions
    assert (one.action, one.layer, one.experts) == ("force", 0, (3,))


@pytest.mark.parametrize(
    ("change", "count", "said"),
    [
        ({}, 5, "only 4 lower the target"),
        ({"effect": [-4.0, -3.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]}, 3, "layer 0"),
    ],
)
def test_too_few_and_too_many_in_a_layer_are_refused(
    change: dict[str, Any], count: int, said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        plan_from_effects(table().assign(**change), count, "lower", LAYERS)
