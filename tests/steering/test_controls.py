"""Controls: the same plan on other experts; random, of similar load, or from the bottom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check_shape
from moescope.steering.controls import bottom_control, load_matched_control, random_control
from moescope.steering.derive import random_plan
from moescope.steering.strategies import make_plan

LAYERS = [LayerShape(layer, "mlp", 16, 4) for layer in range(3)]


def plan(*interventions: dict[str, Any]) -> SteeringPlan:
    return SteeringPlan(name="p", model="m", interventions=interventions)


PLAN = plan(
    {"action": "mask", "layer": 0, "experts": [1, 2, 3], "via": "inf"},
    {"action": "force", "layer": 0, "experts": [4], "tokens": {"first_generated": 2}},
    {"action": "mask", "layers": [1, 2], "experts": [5], "tokens": "prompt", "prompt_ids": [2]},
    {"action": "force", "layer": 2, "experts": [5], "tokens": "generated"},
    {"action": "top_k", "layer": 1, "value": 3},
)


def numbers(column: str, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            {"layer": layer, "kind": "mlp", "expert": expert, column: rng.normal() ** 2}
            for layer in range(3)
            for expert in range(16)
        ]
    )


def the_control(name: str, of: SteeringPlan, seed: int) -> SteeringPlan:
    tables = {"load-matched": numbers("load"), "bottom": numbers("score")}
    return make_plan(name, tables.get(name), layers=LAYERS, of=of, seed=seed)


def named(of: SteeringPlan) -> set[tuple[int, int]]:
    return {(layer, e) for one in of.interventions for layer in one.on_layers for e in one.experts}


@pytest.mark.parametrize("name", ["random", "load-matched", "bottom"])
def test_a_control_differs_in_its_experts_alone(name: str) -> None:
    control = the_control(name, PLAN, 3)
    assert control == the_control(name, PLAN, 3)
    assert (control.interventions == the_control(name, PLAN, 4).interventions) == (name == "bottom")
    assert named(control).isdisjoint(named(PLAN))
    apart = [
        one.model_copy(update={"layer": layer, "layers": None})
        for one in PLAN.interventions
        for layer in one.on_layers
    ]
    for mine, other in zip(apart, control.interventions, strict=True):
        rest = {"experts"}
        assert mine.model_dump(exclude=rest) == other.model_dump(exclude=rest)
        assert len(mine.experts) == len(other.experts)
    first, second, _, third, fourth, _ = control.interventions
    assert set(first.experts).isdisjoint(second.experts)
    assert third.experts == fourth.experts
    assert control.model == "m"
    assert name in control.title
    provenance: Any = control.provenance
    assert (provenance["control"], provenance["of"], provenance["seed"]) == (name, PLAN.plan_id, 3)
    assert provenance["excludes_own_experts"] is True
    check_shape(control, LAYERS)
    assert SteeringPlan.parse(control.to_json()) == control


def test_the_random_control_is_that_of_derive() -> None:
    assert random_control(PLAN, LAYERS, 5) == random_plan(PLAN, LAYERS, 5)


def test_the_nearest_load_takes_the_place() -> None:
    load = pd.DataFrame({"layer": 0, "expert": range(6), "load": [0.3, 0.28, 0.2, 0.1, 0.1, 0.02]})
    layers = [LayerShape(0, "mlp", 6, 2)]
    one = plan({"action": "mask", "layer": 0, "experts": [0, 5]})
    lows = set()
    for seed in range(20):
        control = load_matched_control(one, layers, seed, load, num_nearest=1)
        high, low = control.interventions[0].experts
        assert high == 1
        lows.add(low)
    assert lows == {3, 4}  # they tie
    provenance: Any = control.provenance
    assert provenance["pairs"] == [
        {"layer": 0, "kind": "mlp", "expert": 0, "control": 1, "load": 0.3, "control_load": 0.28},
        {"layer": 0, "kind": "mlp", "expert": 5, "control": low, "load": 0.02, "control_load": 0.1},
    ]  # fmt: skip
    assert provenance["mean_load_difference"] == pytest.approx(0.05)
    assert provenance["largest_load_difference"] == pytest.approx(0.08)


def test_one_of_the_nearest_is_drawn_and_all_of_them_alike() -> None:
    load = pd.DataFrame({"layer": 0, "expert": range(16), "load": np.arange(16) / 120})
    one = plan({"action": "mask", "layer": 0, "experts": [15]})
    counts = dict.fromkeys(range(16), 0)
    for seed in range(200):
        control = load_matched_control(one, LAYERS, seed, load)
        counts[control.interventions[0].experts[0]] += 1
    assert sum(counts[expert] for expert in (11, 12, 13, 14)) == 200
    assert all(27 <= counts[expert] <= 77 for expert in (11, 12, 13, 14))  # 50 expected


def test_matched_experts_are_nearer_in_load_than_random_ones() -> None:
    load = numbers("load")
    known = {(row.layer, row.expert): row.load for row in load.itertuples()}
    busiest = load[load["layer"] == 0].nlargest(3, "load")["expert"].tolist()
    one = plan({"action": "mask", "layer": 0, "experts": busiest})
    own = sum(known[0, expert] for expert in busiest)

    def gap(control: SteeringPlan) -> float:
        return abs(sum(known[0, expert] for expert in control.interventions[0].experts) - own)

    matched = [gap(load_matched_control(one, LAYERS, seed, load)) for seed in range(20)]
    drawn = [gap(random_control(one, LAYERS, seed)) for seed in range(20)]
    assert np.mean(matched) < np.mean(drawn)


def test_the_bottom_is_what_the_ranking_says_least_about() -> None:
    scores = [-0.5, 0.01, 0.02, -0.01, 0.0, 0.3, 0.9, -0.02]
    ranking = pd.DataFrame({"layer": 0, "expert": range(8), "score": scores})
    layers = [LayerShape(0, "mlp", 8, 2)]
    one = plan({"action": "mask", "layer": 0, "experts": [0, 6, 4]})
    control = bottom_control(one, layers, 0, ranking)
    assert control.interventions[0].experts == (1, 2, 3)  # 2 and 7 tie: the lower one
    assert control.provenance["draws"] is False
    assert control.provenance["ranked_by"] == "score"
    other = ranking.assign(effect=[float(8 - expert) for expert in range(8)])
    control = bottom_control(one, layers, 0, other, rank_by="effect")
    assert control.interventions[0].experts == (3, 5, 7)
    confirmed = ranking.assign(confirmed=[expert in (0, 4, 6) for expert in range(8)])
    assert bottom_control(one, layers, 0, confirmed).interventions[0].experts == (1, 2, 3)
    holes = ranking.assign(score=[None if e in (1, 2, 3) else s for e, s in enumerate(scores)])
    with pytest.raises(PlanError, match=r"3 experts of layer 0 are wanted .* has a score of 2"):
        bottom_control(one, layers, 0, holes)


@pytest.mark.parametrize("name", ["random", "load-matched", "bottom"])
def test_a_layer_without_enough_others_fills_up_and_says_so(name: str) -> None:
    wide = plan({"action": "mask", "layer": 0, "experts": list(range(10))})
    control = the_control(name, wide, 0)
    assert set(range(10, 16)) < set(control.interventions[0].experts)
    assert control.provenance["excludes_own_experts"] is False
    assert control.provenance["overlap"] == [{"layer": 0, "kind": "mlp", "num_own_experts": 4}]


def test_what_has_no_control_is_refused() -> None:
    load = numbers("load")
    with pytest.raises(PlanError, match="no load of expert 7 of layer 2"):
        load_matched_control(PLAN, LAYERS, 0, load[(load["layer"] < 2) | (load["expert"] != 7)])
    with pytest.raises(PlanError, match="no column 'load'"):
        load_matched_control(PLAN, LAYERS, 0, load.rename(columns={"load": "share"}))
    with pytest.raises(PlanError, match="holds several values; name one of en, de"):
        split = pd.concat([load.assign(value="en"), load.assign(value="de")])
        load_matched_control(PLAN, LAYERS, 0, split)
    with pytest.raises(PlanError, match="num_nearest is 0"):
        load_matched_control(PLAN, LAYERS, 0, load, num_nearest=0)
    with pytest.raises(PlanError, match="layer 2 has no router"):
        bottom_control(PLAN, LAYERS[:2], 0, numbers("score"))
    with pytest.raises(PlanError, match="p names no experts"):
        number = plan({"action": "top_k", "layer": 0, "value": 2})
        load_matched_control(number, LAYERS, 0, load)
    with pytest.raises(PlanError, match="'bottom' needs a table"):
        make_plan("bottom", of=PLAN, layers=LAYERS)
    with pytest.raises(PlanError, match="'random' needs the model's layers"):
        make_plan("random", of=PLAN)


def test_kinds_of_routers_are_kept_apart() -> None:
    layers = [LayerShape(0, "mlp", 6, 2), LayerShape(0, "attention", 4, 1)]
    table = pd.DataFrame(
        [
            {"layer": 0, "kind": kind, "expert": expert, "load": expert / 10, "score": expert / 10}
            for kind, count in (("mlp", 6), ("attention", 4))
            for expert in range(count)
        ]
    )
    one = plan({"action": "mask", "layer": 0, "kind": "attention", "experts": [3]})
    matched = load_matched_control(one, layers, 0, table, num_nearest=1)
    assert (matched.interventions[0].kind, matched.interventions[0].experts) == ("attention", (2,))
    assert bottom_control(one, layers, 0, table).interventions[0].experts == (0,)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["mask", "force"]),
            st.integers(0, 2),
            st.lists(st.integers(0, 15), min_size=1, max_size=4, unique=True),
            st.sampled_from(["all", "prompt", "generated", "last_prompt"]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
    st.sampled_from(["load-matched", "bottom"]),
)
@settings(max_examples=50, deadline=None)
def test_the_control_of_a_plan_that_fits_fits(parts: list[Any], seed: int, name: str) -> None:
    one = plan(
        *({"action": a, "layer": layer, "experts": e, "tokens": t} for a, layer, e, t in parts)
    )
    try:
        check_shape(one, LAYERS)
    except PlanError:
        with pytest.raises(PlanError):
            the_control(name, one, seed)
        return
    control = the_control(name, one, seed)
    check_shape(control, LAYERS)
    assert [len(item.experts) for item in control.interventions] == [
        len(item.experts) for item in one.interventions
    ]
