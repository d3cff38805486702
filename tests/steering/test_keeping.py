"""What a task needs of each layer: used more, or kept while all else is masked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.errors import PlanError
from moescope.steering import SteeringPlan
from moescope.steering.check import LayerShape, check_shape
from moescope.steering.strategies import make_plan

LAYERS = [LayerShape(layer, "mlp", 6, 2) for layer in (0, 1, 2)]


def chosen(plan: SteeringPlan) -> list[tuple[str, int | None, tuple[int, ...]]]:
    return [(one.action, one.layer, one.experts) for one in plan.interventions]


def left_out(plan: SteeringPlan) -> list[tuple[int, int]]:
    found: Any = plan.provenance["left_out"]
    return [(one["layer"], one["expert"]) for one in found]


def notes(plan: SteeringPlan) -> str:
    found: Any = plan.provenance["notes"]
    return " | ".join(found)


def scored_layers(*scores: Sequence[float], candidates: Sequence[set[int]]) -> pd.DataFrame:
    return pd.DataFrame([
        {"layer": layer, "kind": "mlp", "expert": expert, "score": score,
         "candidate": expert in chosen_ones}
        for layer, (row, chosen_ones) in enumerate(zip(scores, candidates, strict=True))
        for expert, score in enumerate(row)
    ])  # fmt: skip


ESFT = scored_layers(
    [0.1, 0.3, 0.2, 0.1, 0.2, 0.1], [0.6, 0.1, 0.1, 0.0, 0.1, 0.1], candidates=[{1, 2, 4}, {0}]
)


def test_esft_acts_on_its_candidates() -> None:
    plan = make_plan("esft", ESFT, layers=LAYERS)
    assert chosen(plan) == [("scale", 0, (1, 2, 4)), ("scale", 1, (0,))]
    assert {one.setting for one in plan.interventions} == {"scale x2"}
    plan = make_plan("esft", ESFT, layers=LAYERS, use="force")
    assert chosen(plan) == [("force", 0, (1, 2)), ("force", 1, (0,))]
    assert left_out(plan) == [(0, 4)]
    confirmed = ESFT.assign(confirmed=[expert == 1 for expert in ESFT["expert"]])
    plan = make_plan("esft", confirmed, layers=LAYERS, confirmed_only=True)
    assert chosen(plan) == [("scale", 0, (1,))]
    assert len(chosen(make_plan("esft", confirmed, layers=LAYERS))) == 2


@pytest.mark.parametrize(("strategy", "more"), [("esft", {"use": "keep"}), ("keep", {})])
def test_keeping_candidates_never_leaves_fewer_than_k(strategy: str, more: Any) -> None:
    plan = make_plan(strategy, ESFT, layers=LAYERS, **more)
    assert chosen(plan) == [("mask", 0, (0, 3, 5)), ("mask", 1, (2, 3, 4, 5))]
    assert {one.setting for one in plan.interventions} == {"mask via inf"}
    assert "layer 1 has 1 candidates and selects 2, so the next are kept too: 1" in notes(plan)
    assert "kept whole: layers 2" in notes(plan)
    check_shape(plan, LAYERS)


def test_keeping_the_best_of_each_layer() -> None:
    plan = make_plan("keep", ESFT, layers=LAYERS, per_layer=3, via="selection")
    assert chosen(plan) == [("mask", 0, (0, 3, 5)), ("mask", 1, (3, 4, 5))]
    assert "layer 0 keeps all its 6" in notes(
        make_plan("keep", pd.concat([ESFT[ESFT["layer"] == 0].assign(layer=1), ESFT.head(6)]),
                  layers=[LAYERS[0], LayerShape(1, "mlp", 9, 2)], per_layer=6)
    )  # fmt: skip
    for parameters, message in (
        ({"layers": LAYERS, "per_layer": 1}, "1 experts of each layer .* keep at least 2"),
        ({"layers": None}, "needs the model's layers"),
        ({"layers": [LayerShape(0, "mlp", 9, 2), LAYERS[1]], "per_layer": 8},
         "8 experts of layer 0 are to be kept, but the table has 6 experts"),
        ({"layers": LAYERS, "per_layer": 6}, "asked for no experts"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message):
            make_plan("keep", ESFT, **parameters)
    with pytest.raises(PlanError, match="no column 'candidate'"):
        make_plan("keep", ESFT.drop(columns="candidate"), layers=LAYERS)
    with pytest.raises(PlanError, match="has no candidates"):
        make_plan("esft", ESFT.assign(candidate=False), layers=LAYERS)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=3, max_size=3),
    st.integers(2, 5),
)
@settings(max_examples=50, deadline=None)
def test_a_layer_keeps_the_largest_numbers(scores: list[list[int]], number: int) -> None:
    frame = scored_layers(*scores, candidates=[set()] * 3)
    plan = make_plan("keep", frame, layers=LAYERS, per_layer=number)
    for layer, one in enumerate(plan.interventions):
        expected = np.argsort(-np.array(scores[layer]), kind="stable")[:number]
        assert set(one.experts) == set(range(6)) - set(expected.tolist())


def test_real_routing_gives_the_published_experts(shared: Path) -> None:
    """DeepSeek-V2-Lite on two tasks (ESFT's traces): its choice, and the largest differences."""
    folder = shared / "data" / "deepseek_v2_lite_routing"
    rows: list[dict[str, Any]] = []
    for layer in range(1, 27):
        counts = {}
        for task in ("law", "summary"):
            text = (folder / task / f"expert_weights_{layer}.txt").read_text()
            ids = [int(one) for line in text.splitlines() for one in line.split("\t\t")[0].split()]
            counts[task] = np.bincount(ids, minlength=64)
        (a, b), (num_a, num_b) = counts.values(), [one.sum() // 6 for one in counts.values()]
        score = np.round(a / (6 * num_a), 4)
        order = np.argsort(-score, kind="stable")
        kept = set(order[np.cumsum(score[order]) - score[order] < 0.2].tolist())
        rows += [
            {"layer": layer, "expert": e, "a1": a[e], "d1": num_a - a[e], "a2": b[e],
             "d2": num_b - b[e], "score": score[e], "candidate": e in kept}
            for e in range(64)
        ]  # fmt: skip
    frame = pd.DataFrame(rows)
    layers = [LayerShape(layer, "mlp", 64, 6) for layer in range(1, 27)]
    plan = make_plan("steermoe", frame, layers=layers, num_force=1, num_mask=3)
    told: Any = plan.provenance["chosen"]
    assert [(one["layer"], one["expert"], round(one["value"], 6)) for one in told] == [
        (24, 0, 0.544036), (26, 48, -0.586781), (19, 17, -0.551547), (15, 8, -0.540121),
    ]  # fmt: skip
    scaled = make_plan("esft", frame, layers=layers)
    assert sum(len(one.experts) for one in scaled.interventions) == 153
    kept_per_layer = [64 - len(one.experts) for one in
                      make_plan("keep", frame, layers=layers).interventions]  # fmt: skip
    assert (len(kept_per_layer), min(kept_per_layer), max(kept_per_layer)) == (26, 6, 9)
