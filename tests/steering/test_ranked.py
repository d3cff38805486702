"""Which rows of a table take part, in which order, and which tables are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape
from moescope.steering.strategies import make_plan

LAYERS = [LayerShape(layer, "mlp", 6, 2) for layer in (0, 1, 2)]


def chosen(plan: SteeringPlan) -> list[tuple[str, int | None, tuple[int, ...]]]:
    return [(one.action, one.layer, one.experts) for one in plan.interventions]


def left_out(plan: SteeringPlan) -> list[tuple[int, int]]:
    found: Any = plan.provenance["left_out"]
    return [(one["layer"], one["expert"]) for one in found]


def table(*rows: tuple[int, int, float], column: str = "risk_difference") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["layer", "expert", column])


def test_only_confirmed_experts_count_where_the_table_says_which_are() -> None:
    frame = table((0, 1, 0.5), (1, 2, 0.3)).assign(
        confirmed=["False", "True"], effect=[np.nan, 0.25], score=[0.6, 0.2]
    )
    for strategy in ("steermoe", "mote-suppress"):
        number = {"num_force": 1} if strategy == "steermoe" else {"num_experts": 1}
        plan = make_plan(strategy, frame, layers=LAYERS, **number)
        assert chosen(plan)[0][1:] == (1, (2,))
        assert (plan.provenance["ranked_by"], plan.provenance["confirmed_only"]) == ("effect", True)
        plan = make_plan(strategy, frame, layers=LAYERS, confirmed_only=False, **number)
        assert chosen(plan)[0][1:] == (0, (1,))
        plan = make_plan(strategy, frame, layers=LAYERS, rank_by="score", **number)
        assert plan.provenance["ranked_by"] == "score"
    with pytest.raises(PlanError, match="the table has 1 confirmed experts with a positive effect"):
        make_plan("mote-suppress", frame, num_experts=2)
    with pytest.raises(PlanError, match="no column 'confirmed'"):
        make_plan("mote-suppress", frame.drop(columns="confirmed"), confirmed_only=True)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table((7, 0, 0.5)), "has layer 7, where the model has no router"),
        (table((0, 6, 0.5)), "expert 6 of layer 0, but the model has 6 experts there"),
        (table((0, 1, 0.5), (0, 1, 0.4)), "names expert 1 of layer 0 twice"),
        (table((0, 1, 0.5)).drop(columns="layer"), "no column 'layer'; it has expert, risk_diff"),
        (table((0, 1, 0.5), column="other"), "none of the columns 'score', 'effect'"),
        (table((0, 1, float("inf"))), "'risk_difference' of the table holds an infinite number"),
        (table((0, 1, 0.5)).assign(risk_difference="much"), "holds something else than numbers"),
        (table((0, 1, 0.5)).assign(expert=1.5), "'expert' of the table must hold whole numbers"),
        (table((0, 1, 0.5)).assign(layer=-1), "'layer' of the table must hold whole numbers"),
        (table((0, 1, 0.5)).assign(kind="attention"), "kind 'attention' in layer 0, .* has mlp"),
        (table((0, 1, float("nan"))), "table has 0 experts with a positive risk_difference"),
        (table(), "table has 0 experts"),
    ],
)
def test_tables_of_another_model_or_shape_are_refused(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make_plan("mote-suppress", frame, layers=LAYERS, num_experts=1)
    assert "\n" not in str(caught.value)


def test_the_kind_is_named_only_where_a_layer_has_several() -> None:
    frame = table((0, 1, 0.5), (0, 1, 0.4), (1, 0, 0.3))
    frame["kind"] = ["mlp", "attention", "mlp"]
    layers = [*LAYERS, LayerShape(0, "attention", 4, 1)]
    for known in (layers, None):
        plan = make_plan("mote-suppress", frame, layers=known, num_experts=3)
        assert [(one.layer, one.kind, one.experts) for one in plan.interventions] == [
            (0, "attention", (1,)), (0, "mlp", (1,)), (1, None, (0,)),
        ]  # fmt: skip
    one = make_plan("mote-suppress", frame.head(1), layers=layers, num_experts=1)
    assert one.interventions[0].kind == "mlp"
    with pytest.raises(PlanError, match=r"no column 'kind', .* several routers \(attention, mlp\)"):
        make_plan("mote-suppress", table((0, 1, 0.5)), layers=layers, num_experts=1)


def test_each_kind_of_router_has_its_own_room() -> None:
    frame = table((0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (0, 3, 0.6))
    frame["kind"] = ["attention", "attention", "mlp", "mlp"]
    layers = [LayerShape(0, "mlp", 6, 2), LayerShape(0, "attention", 4, 1)]
    plan = make_plan("steermoe", frame, layers=layers, num_force=4)
    assert [(one.kind, one.experts) for one in plan.interventions] == [
        ("attention", (0,)), ("mlp", (2, 3)),
    ]  # fmt: skip
    assert left_out(plan) == [(0, 1)]
