"""A plan as a table and as a map of layers and experts."""

from __future__ import annotations

import pytest

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape
from moescope.steering.plan_view import plan_map, plan_table

LAYERS = [LayerShape(layer, "mlp", 6, 2) for layer in (0, 1, 2)]


def test_a_plan_as_a_table_and_as_a_map() -> None:
    plan = SteeringPlan(
        name="p <1>",
        interventions=[
            {"action": "mask", "layers": [0, 2], "experts": [1, 3], "prompt_ids": [4, 5]},
            {"action": "bias", "layer": 0, "experts": [2], "value": -0.5, "unit": "std",
             "tokens": {"first_generated": 3}},
            {"action": "top_k", "layer": 1, "value": 1},
        ],
    )  # fmt: skip
    found = plan_table(plan, LAYERS)
    assert list(found.itertuples(index=False, name=None))[:5] == [
        (1, 0, "mlp", 1, "mask", "mask via min", "all", "4, 5"),
        (1, 0, "mlp", 3, "mask", "mask via min", "all", "4, 5"),
        (1, 2, "mlp", 1, "mask", "mask via min", "all", "4, 5"),
        (1, 2, "mlp", 3, "mask", "mask via min", "all", "4, 5"),
        (2, 0, "mlp", 2, "bias", "bias -0.5 std", "first 3 generated", "all"),
    ]
    assert found["expert"].isna().tolist() == [False] * 5 + [True]
    assert plan_table(plan)["kind"].isna().all()
    assert plan_table(SteeringPlan()).empty
    figure = plan_map(plan, LAYERS)
    assert [(trace.name, len(trace.x)) for trace in figure.data[1:]] == [
        ("mask", 4), ("bias down", 1), ("whole router", 6),
    ]  # fmt: skip
    assert "p &lt;1&gt;" in figure.layout.title.text
    assert len(plan_map(SteeringPlan(), LAYERS).data) == 1
    both = [*LAYERS, LayerShape(3, "attention", 4, 1)]
    assert len(plan_map(plan, both, kind="attention").data) == 1
    with pytest.raises(PlanError, match="no routers of kind 'encoder'; it has mlp, attention"):
        plan_map(plan, both, kind="encoder")
    with pytest.raises(PlanError, match="layer 2 has no router"):
        plan_map(plan, LAYERS[:2])
