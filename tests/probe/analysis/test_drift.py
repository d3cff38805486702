"""Drift: shifts and kept tokens by hand, against plain loops, planted moves, no false ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.two_runs.drift import expert_drift
from moescope.probe.analysis.two_runs.saturation import router_saturation
from moescope.probe.demo.planted_routing import plant_routing
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

MakeStore = Callable[..., Store]
KEY = ["layer", "expert"]


def rerouted(items: list[Any], share: float, seed: int) -> list[Any]:
    """The same items, some tokens routed anew in some layers; the draws favor low ids."""
    rng = np.random.default_rng(seed)
    favor = np.arange(8, 0, -1) / 36
    changed = []
    for item in items:
        tokens = []
        for token in item.tokens:
            slots = dict(token.slots)
            for layer in token.slots:
                if rng.random() < share:
                    first, second = rng.choice(8, 2, replace=False, p=favor).tolist()
                    slots[layer] = [(first, 0.5), (second, 0.25)]
            tokens.append(replace(token, slots=slots, scores={}))
        changed.append(replace(item, tokens=tokens))
    return changed


@pytest.fixture(scope="module")
def two(make_store: MakeStore, lab: SimpleNamespace, random_items: list[Any]) -> Iterator[Store]:
    shapes = lab.RANDOM_SHAPES
    items = random_items[:36]
    store = make_store(shapes, items)
    lab.write_run(store.path, shapes, rerouted(items, 0.5, 1), run_id="other")
    yield from lab.held_open(store)


def test_numbers_by_hand(make_store: MakeStore, lab: SimpleNamespace) -> None:
    """E = 3, K = 1, four tokens in two prompts; expert 2 is used in neither run."""
    shapes = [lab.Shape(layer=0, num_experts=3, top_k=1)]

    def items(first: list[list[int]], second: list[list[int]]) -> list[Any]:
        return [lab.Item(tokens=lab.tokens_of(part)) for part in (first, second)]

    store = make_store(shapes, items([[0], [0], [1]], [[0]]))
    lab.write_run(store.path, shapes, items([[0], [1], [1]], [[1]]), run_id="base")
    table = expert_drift(store, "run", against="base", permutations=400)
    frame = table.frame.set_index("expert").sort_index()
    assert frame["token_share"].tolist() == [0.75, 0.25, 0]
    assert frame["token_share_against"].tolist() == [0.25, 0.75, 0]
    assert frame["shift"].tolist() == [0.5, -0.5, 0]
    assert frame["kept"].tolist()[:2] == [1, pytest.approx(1 / 3)]
    assert np.isnan(frame.at[2, "kept"])
    assert frame["kept_chance"].tolist() == [0.75, 0.25, 0]
    assert frame["weight_shift"].tolist() == [0.5, -0.5, 0]
    assert frame["num_tokens_against"].tolist() == [1, 3, 0]
    assert set(frame["chance"]) == {1 / 3}
    # Shifts of the prompts 1 of 3 and 1 of 1 around 1/2: residuals -1/2 and 1/2, so the standard
    # error is sqrt(2 * 1/2) / 4, and t(1) = 12.7 carries the interval to the bounds.
    assert (frame.at[0, "low"], frame.at[0, "high"]) == (-1, 1)
    assert (frame.at[2, "low"], frame.at[2, "high"], frame.at[2, "p"]) == (0, 0, 1)
    assert not frame["moved"].any()
    assert table.frame["expert"].tolist() == [0, 1, 2]
    assert table.summary == {"moved": 0, "experts": 3, "saturation": 0.5}
    assert table.notes == (
        "Prompts matched with run 'base': 2.",
        "With so few units no p can be below 0.5: nothing can be called moved at 0.05, whatever "
        "the shifts.",
    )


def test_agreement_with_plain_loops(two: Store) -> None:
    table = expert_drift(two, "run", against="other", permutations=400)
    frame = table.frame.set_index(KEY)
    rows = two.query(
        "SELECT run_id, prompt_id, position, layer, expert, weight FROM routing "
        "JOIN tokens USING (run_id, prompt_id, position) "
        "WHERE NOT is_special AND segment != 'template'"
    )
    weight: dict[str, dict[Any, float]] = {"run": {}, "other": {}}
    for row in rows.itertuples(index=False):
        key = (row.prompt_id, row.position, row.layer, row.expert)
        weight[row.run_id][key] = row.weight
    tokens = {key[:2] for key in weight["run"]}
    for layer, expert in frame.index:
        used, before = (
            {key for key in weight[run_id] if key[2:] == (layer, expert)}
            for run_id in ("run", "other")
        )
        row = frame.loc[(layer, expert)]
        number = len(tokens)
        assert row["token_share"] == pytest.approx(len(used) / number)
        assert row["token_share_against"] == pytest.approx(len(before) / number)
        assert row["shift"] == pytest.approx((len(used) - len(before)) / number)
        assert row["kept"] == pytest.approx(len(used & before) / len(before))
        sums = [
            sum(weight[run_id][key] for key in keys)
            for run_id, keys in (("run", used), ("other", before))
        ]
        assert row["weight_shift"] == pytest.approx((sums[0] - sums[1]) / number)
        by_unit: dict[int, int] = defaultdict(int)
        for keys, sign in ((used, 1), (before, -1)):
            for key in keys:
                by_unit[key[0] // 3] += sign
        per_unit = [sum(prompt // 3 == unit for prompt, _ in tokens) for unit in range(12)]
        shift = row["shift"]
        residual = sum((by_unit[u] - shift * per_unit[u]) ** 2 for u in range(12))
        reach = 2.2009852 * np.sqrt(12 / 11 * residual) / number
        assert row["low"] == pytest.approx(shift - reach)
        assert row["high"] == pytest.approx(shift + reach)
    assert (frame["kept_low"] <= frame["kept"]).all()
    assert (frame["kept"] <= frame["kept_high"]).all()
    assert table.frame["shift"].abs().is_monotonic_decreasing
    saturation = router_saturation(two, "run", against="other").summary["saturation"]
    assert table.summary["saturation"] == pytest.approx(saturation)
    assert set(frame["num_units"]) == {12}
    # The draws of the other run favor low ids.
    moved = table.frame[table.frame["moved"]]
    assert {1, 7} <= set(moved["expert"])
    assert (np.sign(moved["shift"]) == np.where(moved["expert"] < 4, -1, 1)).all()


@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_shifts_sum_to_zero_and_turn_with_the_runs(
    data: st.DataObject, make_store: MakeStore, lab: SimpleNamespace
) -> None:
    tokens = data.draw(st.lists(st.permutations(range(4)), min_size=4, max_size=8))
    others = [data.draw(st.permutations(range(4))) for _ in tokens]

    def items(lists: list[list[int]]) -> list[Any]:
        made = lab.tokens_of([experts[:2] for experts in lists])
        return [lab.Item(tokens=made[:1]), lab.Item(tokens=made[1:3]), lab.Item(tokens=made[3:])]

    shapes = [lab.Shape(layer=0, num_experts=4, top_k=2)]
    store = make_store(shapes, items(tokens))
    lab.write_run(store.path, shapes, items(others), run_id="other")
    table = expert_drift(store, "run", against="other", permutations=400)
    there = table.frame
    back = expert_drift(store, "other", against="run", permutations=400).frame
    assert there["shift"].sum() == pytest.approx(0, abs=1e-12)
    assert there["token_share"].sum() == pytest.approx(2)
    there, back = there.set_index("expert").sort_index(), back.set_index("expert").sort_index()
    for name, mirrored in (("shift", "shift"), ("low", "high"), ("weight_shift", "weight_shift")):
        np.testing.assert_allclose(there[name], -back[mirrored], atol=1e-12)
    np.testing.assert_allclose(there["token_share"], back["token_share_against"])
    used_in_both = there["kept"] * there["num_tokens_against"]
    turned = back["kept"] * back["num_tokens_against"]
    np.testing.assert_allclose(used_in_both.fillna(0), turned.fillna(0), atol=1e-9)
    shared = used_in_both.sum() / there["num_tokens_against"].sum()
    assert table.summary["saturation"] == pytest.approx(shared)


def test_planted_moves_are_found_and_nothing_else(make_store: MakeStore, lab: Any) -> None:
    """Where expert 3 of layer 2 was used, expert 0 is, unless the token had it already."""
    truth = plant_routing(prompts_per_cell=2, tokens_per_prompt=10)
    store = make_store(lab.PLANTED_SHAPES, lab.planted_items(truth), run_id="base")

    def write(run_id: str, expert_ids: Any) -> None:
        items = lab.planted_items(replace(truth, expert_ids=expert_ids))
        lab.write_run(store.path, lab.PLANTED_SHAPES, items, run_id=run_id)

    changed = truth.expert_ids.copy()
    layer = changed[:, 2]
    free = ~(layer == 0).any(axis=1)
    layer[free] = np.where(layer[free] == 3, 0, layer[free])
    write("moved", changed)
    table = expert_drift(store, "moved", against="base")
    moved = table.frame[table.frame["moved"]]
    assert {(row.layer, row.expert) for row in moved.itertuples()} == {(2, 0), (2, 3)}
    assert table.frame.loc[2:, "shift"].eq(0).all()
    assert table.frame.loc[2:, "p"].eq(1).all()
    by_expert = moved.set_index("expert")
    assert by_expert.at[0, "shift"] == pytest.approx(-by_expert.at[3, "shift"])
    assert by_expert.at[0, "kept"] == 1
    assert table.summary["moved"] == 2
    # One domain alone shows the specialists that an exchange of them moves.
    names = np.arange(24)
    names[[20, 21]] = 21, 20
    changed = truth.expert_ids.copy()
    changed[:, 1] = names[changed[:, 1]]
    write("exchanged", changed)
    filters = Filters(fields={"domain": ("facts",)})
    frame = expert_drift(store, "exchanged", against="base", filters=filters).frame
    assert frame["shift"].tolist()[:3] == [pytest.approx(s, abs=0) for s in (-1, 1, 0)]
    assert frame["kept"].tolist()[0] == 0


def test_runs_that_differ_by_chance_alone_have_not_moved(
    make_store: MakeStore, lab: Any, random_items: list[Any]
) -> None:
    """Both runs draw half of all tokens again from the same distribution."""
    shapes = lab.RANDOM_SHAPES
    items = random_items[:36]
    store = make_store(shapes, rerouted(items, 0.5, 2))
    lab.write_run(store.path, shapes, rerouted(items, 0.5, 3), run_id="other")
    table = expert_drift(store, "run", against="other", permutations=1_000)
    assert table.summary["saturation"] < 0.75
    assert table.summary["moved"] == 0
    assert not table.frame["shift"].eq(0).all()


def test_the_test_is_seeded_and_the_level_is_kept(two: Store) -> None:
    one, other = (
        expert_drift(two, "run", against="other", permutations=400, seed=seed).frame
        for seed in (1, 2)
    )
    same = expert_drift(two, "run", against="other", permutations=400, seed=1, level=0.2).frame
    assert one["p"].equals(same["p"])
    assert not one["p"].equals(other["p"])
    assert (one["moved"] == (one["p"] <= 0.05)).all()
    assert (same["moved"] == (same["p"] <= 0.2)).all()


def test_one_unit_has_no_p(two: Store) -> None:
    filters = Filters(fields={"pair_id": ("p3",)})
    table = expert_drift(two, "run", against="other", filters=filters)
    assert table.frame[["p", "low", "high"]].isna().all(axis=None)
    assert not table.frame["moved"].any()
    assert "With one unit no shift can be tested." in table.notes


def test_bad_parameters_are_refused(two: Store) -> None:
    with pytest.raises(AnalysisInputError, match="level is 0; it lies between 0 and 1"):
        expert_drift(two, "run", against="other", level=0)
    with pytest.raises(
        AnalysisInputError, match=r"100 permutations are too few at level 0\.05; 400"
    ):
        expert_drift(two, "run", against="other", permutations=100)
    with pytest.raises(AnalysisInputError, match="compared with itself"):
        expert_drift(two, "run", against="run")
