"""Plans from tables: order, ties, caps that are told, and random controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check_shape
from moescope.steering.derive import plan_from_contrast, random_plan, read_contrast_table
from moescope.steering.plan import Intervention

LAYERS = [LayerShape(layer, "mlp", 4, 2) for layer in (0, 1, 2)]


def table(*rows: tuple[int, int, float], confirmed: Sequence[bool] | None = None) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["layer", "expert", "effect"])
    frame["confirmed"] = [True] * len(rows) if confirmed is None else list(confirmed)
    return frame


def chosen(plan: SteeringPlan) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(one.action, one.layer, one.experts) for one in plan.interventions]


TABLE = table((0, 1, 0.5), (1, 2, 0.3), (0, 3, 0.4), (2, 0, -0.6), (1, 0, -0.1), (2, 1, 0.0))


def test_largest_positive_effects_are_masked_and_most_negative_forced() -> None:
    plan = plan_from_contrast(
        TABLE, num_mask=2, num_force=1, layers=LAYERS, name="n", model="m",
        provenance={"run": "base"}, tokens="generated", via="inf", strength="natural",
    )  # fmt: skip
    assert chosen(plan) == [("mask", 0, (1, 3)), ("force", 2, (0,))]
    assert [one.setting for one in plan.interventions] == ["mask via inf", "force natural"]
    assert {one.tokens for one in plan.interventions} == {"generated"}
    assert (plan.name, plan.model) == ("n", "m")
    assert plan.provenance == {
        "run": "base", "ranked_by": "effect", "confirmed_only": True, "num_mask": 2,
        "num_force": 1, "left_out": [], "capped": True,
        "effects": [
            {"layer": 0, "expert": 1, "effect": 0.5},
            {"layer": 0, "expert": 3, "effect": 0.4},
            {"layer": 2, "expert": 0, "effect": -0.6},
        ],
    }  # fmt: skip
    assert SteeringPlan.parse(plan.to_json()) == plan


def test_ties_go_to_the_lower_layer_and_expert_on_both_sides() -> None:
    ties = table((2, 0, 0.5), (1, 3, 0.5), (1, 2, 0.5), (0, 2, -0.5), (0, 1, -0.5), (2, 3, -0.5))
    assert chosen(plan_from_contrast(ties, num_mask=2, layers=LAYERS)) == [("mask", 1, (2, 3))]
    plan = plan_from_contrast(ties, num_mask=0, num_force=1, layers=LAYERS)
    assert chosen(plan) == [("force", 0, (1,))]


def test_a_full_layer_is_skipped_for_the_next_expert_and_that_is_told() -> None:
    full = table((0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (1, 0, 0.1))
    plan = plan_from_contrast(full, num_mask=3, layers=LAYERS)
    assert chosen(plan) == [("mask", 0, (0, 1)), ("mask", 1, (0,))]
    assert plan.provenance["left_out"] == [
        {
            "layer": 0,
            "expert": 2,
            "reason": "2 experts of this layer are masked already, all it allows",
        }
    ]
    check_shape(plan, LAYERS)
    forced = full.assign(effect=-full["effect"])
    plan = plan_from_contrast(forced, num_mask=0, num_force=3, layers=LAYERS)
    assert chosen(plan) == [("force", 0, (0, 1)), ("force", 1, (0,))]
    uncapped = plan_from_contrast(full, num_mask=3)
    assert chosen(uncapped) == [("mask", 0, (0, 1, 2))]
    assert uncapped.provenance["capped"] is False


def test_too_few_experts_are_refused_with_the_number_there_is() -> None:
    message = "4 experts are to be masked, but the table has 3 confirmed experts that group a uses"
    with pytest.raises(PlanError, match=message):
        plan_from_contrast(TABLE, num_mask=4, layers=LAYERS)
    with pytest.raises(PlanError, match="3 experts are to be forced, but the table has 2"):
        plan_from_contrast(TABLE, num_mask=1, num_force=3, layers=LAYERS)
    full = table((0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7))
    with pytest.raises(PlanError, match=r"\(1 more do not fit their layers\); ask for at most 2"):
        plan_from_contrast(full, num_mask=3, layers=LAYERS)
    with pytest.raises(PlanError, match="ask for at least one"):
        plan_from_contrast(full, num_mask=0)


def test_only_confirmed_experts_count_unless_told_otherwise() -> None:
    frame = table((0, 1, 0.5), (1, 2, 0.3), confirmed=[False, True])
    frame["risk_difference"] = [0.6, 0.2]
    assert chosen(plan_from_contrast(frame, num_mask=1)) == [("mask", 1, (2,))]
    loose = plan_from_contrast(frame, num_mask=1, confirmed_only=False)
    assert chosen(loose) == [("mask", 0, (1,))]
    assert loose.provenance["ranked_by"] == "risk_difference"
    as_text = frame.assign(confirmed=["False", "True"])
    assert chosen(plan_from_contrast(as_text, num_mask=1)) == [("mask", 1, (2,))]
    with pytest.raises(PlanError, match="no column 'confirmed'"):
        plan_from_contrast(frame.drop(columns="confirmed"), num_mask=1)


def test_counts_of_other_tools_give_the_risk_difference() -> None:
    counts = pd.DataFrame(
        {"layer": [0, 1], "expert": [1, 2], "a1": [8, 1], "d1": [2, 9], "a2": [1, 8], "d2": [9, 2]}
    )
    plan = plan_from_contrast(counts, num_mask=1, num_force=1, confirmed_only=False)
    assert chosen(plan) == [("mask", 0, (1,)), ("force", 1, (2,))]
    assert plan.provenance["effects"][0]["effect"] == pytest.approx(0.7)
    with pytest.raises(PlanError, match="neither a column 'risk_difference' nor the counts"):
        plan_from_contrast(counts.drop(columns="a1"), num_mask=1, confirmed_only=False)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table((7, 0, 0.5)), "layer 7, where the model has no router"),
        (table((0, 9, 0.5)), "expert 9 of layer 0, but the model has 4 experts there"),
        (table((0, 1, 0.5), (0, 1, 0.4)), "names an expert twice"),
        (table((0, 1, 0.5)).drop(columns="layer"), "the table has no column 'layer'; it has"),
    ],
)
def test_tables_of_another_model_or_shape_are_refused(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_from_contrast(frame, num_mask=1, layers=LAYERS)


def test_the_kind_is_named_only_where_a_layer_has_several() -> None:
    frame = table((0, 1, 0.5), (0, 2, 0.4), (1, 0, 0.3))
    frame["kind"] = ["attention", "mlp", "mlp"]
    layers = [*LAYERS, LayerShape(0, "attention", 4, 2)]
    plan = plan_from_contrast(frame, num_mask=3, layers=layers)
    assert [(one.layer, one.kind, one.experts) for one in plan.interventions] == [
        (0, "attention", (1,)), (0, "mlp", (2,)), (1, None, (0,)),
    ]  # fmt: skip


def test_tables_are_read_from_files(tmp_path: Path) -> None:
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    TABLE.to_parquet(tmp_path / "t.parquet")
    TABLE.to_json(tmp_path / "t.json", orient="records")
    for name in ("t.csv", "t.parquet", "t.json"):
        frame = read_contrast_table(tmp_path / name)
        assert chosen(plan_from_contrast(frame, num_mask=2)) == [("mask", 0, (1, 3))]
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "bad.json").write_text("[1,")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, message in {
        "t.txt": "is a .csv, .parquet or .json file",
        "none.csv": "there is no such table",
        "bad.parquet": "this is no .parquet table",
        "bad.json": "this is no .json table",
        "other.csv": "no column 'layer' and no column 'expert'; it has a, b",
    }.items():
        with pytest.raises(PlanError) as caught:
            read_contrast_table(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def wide(*interventions: dict[str, Any]) -> SteeringPlan:
    return SteeringPlan(name="w", model="m", interventions=interventions)


WIDE = [LayerShape(layer, "mlp", 16, 4) for layer in range(3)]


def test_a_random_plan_differs_in_its_experts_alone() -> None:
    plan = wide(
        {"action": "mask", "layer": 0, "experts": [1, 2, 3], "via": "inf"},
        {"action": "force", "layer": 0, "experts": [4], "tokens": {"first_generated": 2}},
        {"action": "mask", "layer": 2, "experts": [5], "tokens": "prompt"},
        {"action": "force", "layer": 2, "experts": [5], "tokens": "generated"},
    )
    control = random_plan(plan, WIDE, seed=3)
    assert control == random_plan(plan, WIDE, seed=3)
    assert control.interventions != random_plan(plan, WIDE, seed=4).interventions
    own = {(one.layer, expert) for one in plan.interventions for expert in one.experts}
    drawn = [(one.layer, expert) for one in control.interventions for expert in one.experts]
    assert own.isdisjoint(drawn)
    for mine, other in zip(plan.interventions, control.interventions, strict=True):
        rest = {"experts"}
        assert mine.model_dump(exclude=rest) == other.model_dump(exclude=rest)
        assert len(mine.experts) == len(other.experts)
    first, second, third, fourth = control.interventions
    assert set(first.experts).isdisjoint(second.experts)
    assert third.experts == fourth.experts
    assert control.provenance == {
        "control": "random", "of": plan.plan_id, "seed": 3, "excludes_own_experts": True,
        "overlap": [],
    }  # fmt: skip
    assert control.model == "m"
    assert "seed 3" in control.title
    check_shape(control, WIDE)


def test_random_plans_use_all_other_experts_alike() -> None:
    plan = wide({"action": "mask", "layer": 1, "experts": [0, 1]})
    counts = dict.fromkeys(range(16), 0)
    for seed in range(700):
        for expert in random_plan(plan, WIDE, seed).interventions[0].experts:
            counts[expert] += 1
    assert counts[0] == counts[1] == 0
    assert all(60 <= counts[expert] <= 145 for expert in range(2, 16))  # 100 expected


def test_a_layer_without_enough_others_fills_up_and_says_so() -> None:
    plan = wide({"action": "mask", "layer": 0, "experts": list(range(10))})
    control = random_plan(plan, WIDE, seed=0)
    assert set(range(10, 16)) < set(control.interventions[0].experts)
    assert control.provenance["excludes_own_experts"] is False
    assert control.provenance["overlap"] == [{"layer": 0, "kind": "mlp", "num_own_experts": 4}]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mask", "force"]),
            st.integers(0, 2),
            st.lists(st.integers(0, 15), min_size=1, max_size=4, unique=True),
            st.sampled_from(["all", "prompt", "generated", "last_prompt"]),
        ),
        max_size=4,
    ),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_control_of_a_plan_that_fits_fits(parts: list[Any], seed: int) -> None:
    plan = wide(
        *({"action": a, "layer": layer, "experts": e, "tokens": t} for a, layer, e, t in parts)
    )
    try:
        check_shape(plan, WIDE)
    except PlanError:
        with pytest.raises(PlanError):
            random_plan(plan, WIDE, seed)
        return
    control = random_plan(plan, WIDE, seed)
    check_shape(control, WIDE)
    assert all(isinstance(one, Intervention) for one in control.interventions)
    assert SteeringPlan.parse(control.to_json()) == control
