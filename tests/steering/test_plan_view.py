"""A plan as a table and as a map of layers and experts."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape
from moescope.steering.controls import load_matched_control
from moescope.steering.derive import plan_from_contrast
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
    assert list(found.iloc[:, :8].itertuples(index=False, name=None))[:5] == [
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
        ("mask (4)", 4), ("bias down (1)", 1), ("whole router (1)", 6),
    ]  # fmt: skip
    assert "p &lt;1&gt;" in figure.layout.title.text
    assert len(plan_map(SteeringPlan(), LAYERS).data) == 1
    both = [*LAYERS, LayerShape(3, "attention", 4, 1)]
    assert len(plan_map(plan, both, kind="attention").data) == 1
    with pytest.raises(PlanError, match="no routers of kind 'encoder'; it has mlp, attention"):
        plan_map(plan, both, kind="encoder")
    with pytest.raises(PlanError, match="layer 2 has no router"):
        plan_map(plan, LAYERS[:2])


def test_what_an_expert_was_chosen_by_stands_in_the_table_and_on_its_mark() -> None:
    frame = pd.DataFrame({"layer": [0, 1, 2], "expert": [5, 4, 3], "effect": [0.4, 0.2, -0.3],
                          "confirmed": True})  # fmt: skip
    plan = plan_from_contrast(frame, num_mask=2, num_force=1, layers=LAYERS)
    found = plan_table(plan, LAYERS)
    assert found[["layer", "expert", "basis", "basis_value"]].values.tolist() == [
        [0, 5, "effect", 0.4], [1, 4, "effect", 0.2], [2, 3, "effect", -0.3],
    ]  # fmt: skip
    masks, forces = plan_map(plan, LAYERS).data[1:]
    assert list(masks.customdata) == [
        "mask via min, tokens: all, effect +0.4", "mask via min, tokens: all, effect +0.2",
    ]  # fmt: skip
    assert masks.marker.size[0] > forces.marker.size[0] > masks.marker.size[1]
    assert "larger marks: larger effect" in plan_map(plan, LAYERS).layout.title.subtitle.text
    matched = load_matched_control(
        plan, LAYERS, 0,
        pd.DataFrame([{"layer": layer, "expert": expert, "load": (expert + 1) / 100}
                      for layer in range(3) for expert in range(6)]),
    )  # fmt: skip
    loads = plan_table(matched, LAYERS)
    assert set(loads["basis"]) == {"load"}
    assert loads["basis_value"].tolist() == [(expert + 1) / 100 for expert in loads["expert"]]


@pytest.mark.parametrize(
    "odd",
    [
        {"effects": 3}, {"effects": [3]}, {"effects": [{"layer": "x", "expert": [], "effect": 1}]},
        {"chosen": [{"layer": 0, "expert": 1, "value": None}]},
    ],
)  # fmt: skip
def test_provenance_of_another_make_is_passed_over(odd: dict[str, Any]) -> None:
    plan = SteeringPlan(
        provenance=odd, interventions=[{"action": "mask", "layer": 0, "experts": [1]}]
    )
    assert plan_table(plan)["basis_value"].isna().all()


def test_without_the_models_layers_only_what_is_named_is_drawn() -> None:
    plan = SteeringPlan(
        interventions=[
            {"action": "force", "layers": [3, 7], "experts": [0, 4]},
            {"action": "top_k", "layer": 5, "value": 9},
        ]
    )
    figure = plan_map(plan)
    assert list(figure.data[0].y) == [3, 5, 7] and len(figure.data[0].x) == 5
    assert [(trace.name, len(trace.x)) for trace in figure.data[1:]] == [
        ("force (4)", 4), ("whole router (1)", 5),
    ]  # fmt: skip
    assert "only what the plan names is drawn" in figure.layout.title.subtitle.text
    assert "4 experts in 3 layers" in figure.layout.title.subtitle.text
    assert len(plan_map(SteeringPlan()).data) == 0
