"""Transitions between layers: by hand, against loops over rows, with planted successors."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.pairs import pair_counts
from moescope.probe.analysis.pairs.entries import PAIR_ANALYSES
from moescope.probe.analysis.pairs.transition_strength import transition_strength
from moescope.probe.analysis.pairs.transitions import expert_transitions
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

DATA = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"


def two_layers(lab: SimpleNamespace, rows: Any, **fields: Any) -> Any:
    """A prompt; each row is the experts of one token in layers 0 and 3, first rank first."""
    return lab.Item(
        tokens=[
            lab.Token(
                slots={
                    layer: [(expert, 1 / (2 + rank)) for rank, expert in enumerate(experts)]
                    for layer, experts in zip((0, 3), row, strict=True)
                }
            )
            for row in rows
        ],
        fields=fields,
    )


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """5 tokens; layers 0 (3 experts, top-2) and 3 (4 experts, top-2), nothing routed between."""
    shapes = [
        lab.Shape(layer=0, num_experts=3, top_k=2),
        lab.Shape(layer=3, num_experts=4, top_k=2),
    ]
    items = [
        two_layers(lab, [([0, 1], [3, 0]), ([0, 1], [3, 1]), ([1, 0], [2, 3])]),
        two_layers(lab, [([0, 1], [0, 3]), ([1, 0], [2, 0])]),
    ]
    yield from lab.held_open(make_store(shapes, items))


def test_top1_by_hand(small: Store) -> None:
    table = expert_transitions(small, "run")
    frame = table.frame.set_index(["expert", "successor"])
    assert len(frame) == 3 * 4
    assert set(frame["layer"]) == {0}
    assert set(frame["next_layer"]) == {3}
    assert frame.loc[0, "num_pairs"].tolist() == [1, 0, 0, 2]
    assert frame.loc[0, "share"].tolist() == pytest.approx([1 / 3, 0, 0, 2 / 3])
    assert frame.loc[1, "share"].tolist() == [0, 0, 1, 0]
    assert frame.loc[0, "base_rate"].tolist() == pytest.approx([0.2, 0, 0.4, 0.4])
    assert frame.at[(0, 3), "lift"] == pytest.approx(5 / 3)
    assert np.isnan(frame.at[(0, 1), "lift"])
    assert frame.at[(1, 2), "low"] == frame.at[(1, 2), "high"] == 1
    assert frame.at[(0, 3), "num_slots"] == 3
    assert frame.at[(0, 3), "num_tokens"] == 5
    # Expert 2 is nobody's top-1.
    assert frame.loc[2, ["share", "low", "high", "lift", "hit_rate"]].isna().all(axis=None)
    assert frame.loc[2, "num_slots"].tolist() == [0] * 4
    pd.testing.assert_series_equal(frame["share"], frame["hit_rate"], check_names=False)


def test_topk_by_hand(small: Store) -> None:
    frame = expert_transitions(small, "run", slots="topk").frame.set_index(["expert", "successor"])
    # Both experts are used by all five tokens; 3 is among the slots of four of them.
    for expert in (0, 1):
        assert frame.loc[expert, "num_pairs"].tolist() == [3, 1, 2, 4]
        assert frame.loc[expert, "hit_rate"].tolist() == [0.6, 0.2, 0.4, 0.8]
        assert frame.loc[expert, "share"].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4])
        assert frame.loc[expert, "lift"].tolist() == pytest.approx([1] * 4)
    assert frame.loc[0, "hit_base_rate"].tolist() == [0.6, 0.2, 0.4, 0.8]
    assert frame.loc[0, "base_rate"].tolist() == pytest.approx([0.3, 0.1, 0.2, 0.4])
    np.testing.assert_allclose(frame["low"] * 2, frame["hit_low"])


def test_strength_by_hand(small: Store) -> None:
    table = transition_strength(small, "run", shuffles=400)
    (row,) = table.frame.to_dict("records")
    assert row["best_successor_share"] == pytest.approx((2 + 2) / 5)
    assert row["base_rate"] == pytest.approx(0.4)
    assert row["gain"] == pytest.approx(0.4)
    # e is 0 0 1 0 1, e' is 3 3 2 0 2: e is a function of e', so I = H(e).
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert row["mutual_information"] == pytest.approx(entropy)
    following = -(0.8 * math.log(0.4) + 0.2 * math.log(0.2))
    assert row["next_entropy"] == pytest.approx(following)
    assert row["excess_information"] == pytest.approx(entropy - row["information_chance"])
    assert row["information_share"] == pytest.approx(row["excess_information"] / following)
    # On five tokens shuffling alone leaves most of it; by full enumeration:
    chance, gain = enumerated([0, 0, 1, 0, 1], [3, 3, 2, 0, 2])
    assert row["information_chance"] == pytest.approx(chance, abs=0.03)
    assert row["gain_chance"] == pytest.approx(gain, abs=0.03)
    assert (row["num_units"], row["num_prompts"], row["num_tokens"]) == (2, 2, 5)


def enumerated(first: list[int], second: list[int]) -> tuple[float, float]:
    """Mean information and gain over all permutations of the second list."""
    found = [measures(first, order) for order in itertools.permutations(second)]
    return (
        float(np.mean([information for *_, information in found])),
        float(np.mean([best - base for best, base, _ in found])),
    )


def measures(first: Any, second: Any) -> tuple[float, float, float]:
    """Best successor share, base rate and mutual information of two lists, by counting."""
    number, pairs = len(first), Counter(zip(first, second, strict=True))
    ones, others = Counter(first), Counter(second)
    best = sum(max(n for (i, _), n in pairs.items() if i == expert) for expert in ones)
    information = sum(
        n / number * math.log(n * number / ones[i] / others[j]) for (i, j), n in pairs.items()
    )
    return best / number, max(others.values()) / number, information


def top_experts(store: Store) -> tuple[dict[int, list[list[int]]], list[str]]:
    """Layer -> slots of every content token in rank order, and each token's unit, row by row."""
    rows = store.query(
        "SELECT r.layer, r.expert, r.rank, r.prompt_id, r.position, p.pair_id FROM routing r JOIN "
        "tokens t USING (run_id, prompt_id, position) JOIN prompts p USING (run_id, prompt_id) "
        "WHERE NOT is_special AND segment != 'template' ORDER BY prompt_id, position, layer, rank"
    )
    slots: dict[int, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    units: dict[Any, str] = {}
    for row in rows.itertuples(index=False):
        slots[row.layer][row.prompt_id, row.position].append(row.expert)
        units[row.prompt_id, row.position] = row.pair_id
    return {layer: list(own.values()) for layer, own in slots.items()}, list(units.values())


@pytest.mark.parametrize(("slots", "distance"), [("top1", 1), ("topk", 1), ("topk", 2)])
def test_the_table_is_that_of_plain_loops(random_store: Store, slots: Any, distance: int) -> None:
    used, units = top_experts(random_store)
    frame = expert_transitions(random_store, "run", slots=slots, distance=distance).frame
    layers = sorted(used)
    links = list(zip(layers, layers[distance:], strict=False))
    assert list(dict.fromkeys(zip(frame["layer"], frame["next_layer"], strict=True))) == links
    kept = 1 if slots == "top1" else 2
    for layer, following in links:
        pairs: dict[Any, Counter[str]] = defaultdict(Counter)
        users: dict[int, Counter[str]] = defaultdict(Counter)
        base: Counter[int] = Counter()
        for ours, theirs, unit in zip(used[layer], used[following], units, strict=True):
            base.update(theirs[:kept])
            for i in ours[:kept]:
                users[i][unit] += 1
                for j in theirs[:kept]:
                    pairs[i, j][unit] += 1
        part = frame[frame["layer"] == layer]
        assert len(part) == 64
        for row in part.to_dict("records"):
            n, d = pairs[row["expert"], row["successor"]], users[row["expert"]]
            hit = n.total() / d.total()
            chance = base[row["successor"]] / len(units)
            variance = sum((n[u] - hit * d[u]) ** 2 for u in d) * len(d) / (len(d) - 1)
            reach = stats.t.ppf(0.975, len(d) - 1) * math.sqrt(variance) / d.total()
            expected = {
                "num_pairs": n.total(), "num_slots": d.total(), "num_units": len(d),
                "hit_rate": hit, "hit_base_rate": chance,
                "hit_low": max(hit - reach, 0), "hit_high": min(hit + reach, 1),
                "share": hit / kept, "base_rate": chance / kept, "lift": hit / chance,
            }  # fmt: skip
            assert {name: row[name] for name in expected} == pytest.approx(expected)
    np.testing.assert_allclose(frame.groupby(["layer", "expert"])["share"].sum(), 1)
    np.testing.assert_allclose(frame.groupby(["layer", "expert"])["base_rate"].sum(), 1)


def test_strength_is_that_of_plain_loops(random_store: Store) -> None:
    used, _ = top_experts(random_store)
    table = transition_strength(random_store, "run", seed=5)
    for row in table.frame.to_dict("records"):
        first, second = (
            [slots[0] for slots in used[row[name]]] for name in ("layer", "next_layer")
        )
        best, base, information = measures(first, second)
        assert row["best_successor_share"] == pytest.approx(best)
        assert row["base_rate"] == pytest.approx(base)
        assert row["mutual_information"] == pytest.approx(information)
        rng = np.random.default_rng(0)
        shuffled = [measures(first, rng.permutation(second).tolist()) for _ in range(20)]
        assert row["information_chance"] == pytest.approx(
            np.mean([found[2] for found in shuffled]), rel=0.25
        )
        # The layers are independent: nothing beyond chance.
        assert row["excess_low"] < 0.005
        assert abs(row["information_share"]) < 0.02
        assert abs(row["gain"] - row["gain_chance"]) < 0.03
    assert table.frame.equals(transition_strength(random_store, "run", seed=5).frame)
    other = transition_strength(random_store, "run", seed=6).frame
    assert not table.frame["information_chance"].equals(other["information_chance"])


ROWS = st.lists(
    st.tuples(
        st.permutations(range(4)).map(lambda experts: experts[:2]),
        st.permutations(range(5)).map(lambda experts: experts[:3]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=4, deadline=None)
@given(rows=ROWS, cut=st.integers(0, 12), names=st.permutations(range(5)))
def test_sums_bounds_and_names(
    make_store: Callable[..., Store], lab: SimpleNamespace, rows: Any, cut: int, names: list[int]
) -> None:
    """The kind attention routes as the kind mlp does, with other names for the successors."""
    items = []
    for part in (rows[:cut], rows[cut:]):
        tokens = [
            lab.Token(slots={
                0: [(e, 1 / (2 + r)) for r, e in enumerate(first)],
                1: [(e, 1 / (2 + r)) for r, e in enumerate(second)],
                2: [(e, 1 / (2 + r)) for r, e in enumerate(first)],
                3: [(names[e], 1 / (2 + r)) for r, e in enumerate(second)],
            })
            for first, second in part
        ]  # fmt: skip
        items += [lab.Item(tokens=tokens)] if tokens else []
    shapes = [
        lab.Shape(layer=layer, num_experts=4 + layer % 2, top_k=2 + layer % 2,
                  kind="mlp" if layer < 2 else "attention")
        for layer in range(4)
    ]  # fmt: skip
    store = make_store(shapes, items)
    for slots, per_token in (("top1", 1), ("topk", 3)):
        frame = expert_transitions(store, "run", slots=slots).frame  # type: ignore[arg-type]
        used = frame[frame["num_slots"] > 0]
        keys = ["kind", "expert"]
        np.testing.assert_allclose(used.groupby(keys)["share"].sum(), 1)
        np.testing.assert_allclose(used.groupby(keys)["hit_rate"].sum(), per_token)
        assert (used["hit_rate"] <= 1 + 1e-12).all()
        assert not (used["low"] > used["share"] + 1e-12).any()
        assert not (used["high"] < used["share"] - 1e-12).any()
        plain, renamed = (
            frame[frame["kind"] == kind].drop(columns=["layer", "next_layer", "kind"])
            for kind in ("mlp", "attention")
        )
        renamed["successor"] = [names.index(e) for e in renamed["successor"]]
        order = ["expert", "successor"]
        pd.testing.assert_frame_equal(
            plain.set_index(order).sort_index(), renamed.set_index(order).sort_index()
        )
    strength = transition_strength(store, "run").frame
    assert len(strength) == 2
    assert (strength["best_successor_share"] >= strength["base_rate"] - 1e-12).all()
    assert (strength["mutual_information"] <= strength["next_entropy"] + 1e-12).all()


def test_planted_successors_are_found_and_no_others(planted_store: Store) -> None:
    frame = expert_transitions(planted_store, "run", slots="topk").frame
    sure = frame[frame["hit_rate"] == 1]
    found = sure[["layer", "next_layer", "expert", "successor"]].to_numpy()
    # Of layer 2 to 3 the planted ones; no layer has another.
    assert [tuple(row) for row in found] == [(2, 3, 5, 17), (2, 3, 9, 2)]
    assert sure["share"].tolist() == [0.25, 0.25]
    assert (sure["hit_low"] == 1).all()
    assert (sure["hit_base_rate"] < 0.2).all()
    own = frame[frame["layer"] == 2].drop(sure.index)
    assert own["hit_rate"].max() < 0.5
    # Only tokens of these two experts get their successors, so lift is 1 over the base rate.
    assert sure["lift"].tolist() == pytest.approx((1 / sure["hit_base_rate"]).tolist())
    assert own.loc[own["expert"].isin([5, 9]), "lift"].max() < 1.5


def test_a_sure_top1_successor_is_all_information(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    rng = np.random.default_rng(2)
    items = [
        two_layers(lab, [([e], [(e + 1) % 3]) for e in rng.integers(0, 3, 20).tolist()])
        for _ in range(10)
    ]
    shapes = [lab.Shape(layer=layer, num_experts=3, top_k=1) for layer in (0, 3)]
    row = transition_strength(make_store(shapes, items), "run").frame.iloc[0]
    assert row["best_successor_share"] == 1
    assert row["mutual_information"] == pytest.approx(row["next_entropy"])
    assert row["information_share"] == pytest.approx(1, abs=0.02)
    assert row["gain_low"] < row["gain"] < row["gain_high"]
    assert row["information_share_low"] > 0.9


def test_distance_counts_routed_layers_of_the_model(random_store: Store) -> None:
    """Layers 1, 2, 4: whatever is selected, 4 is two routed layers after 1."""
    filters = Filters(layers=(1, 4))
    frame = expert_transitions(random_store, "run", filters=filters, distance=2).frame
    assert set(zip(frame["layer"], frame["next_layer"], strict=True)) == {(1, 4)}
    for analysis in (expert_transitions, transition_strength):
        with pytest.raises(AnalysisInputError, match=r"no two selected layers .* 1 routed layers"):
            analysis(random_store, "run", filters=filters)


def test_one_prompt_gives_numbers_without_intervals(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    shapes = [lab.Shape(layer=layer, num_experts=2, top_k=1) for layer in (0, 3)]
    store = make_store(shapes, [two_layers(lab, [([0], [1]), ([1], [1])])])
    row = transition_strength(store, "run").frame.iloc[0]
    assert row["base_rate"] == row["best_successor_share"] == 1
    assert row["mutual_information"] == row["next_entropy"] == 0
    assert np.isnan(row["information_share"])
    assert row[["gain_low", "gain_high", "excess_low", "excess_high"]].isna().all()
    frame = expert_transitions(store, "run").frame
    assert frame[["low", "high", "hit_low", "hit_high"]].isna().all(axis=None)


def test_what_cannot_be_answered_is_refused(
    small: Store, make_store: Callable[..., Store], lab: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(AnalysisInputError, match="slots is 'top2'; it is one of top1, topk"):
        expert_transitions(small, "run", slots="top2")  # type: ignore[arg-type]
    with pytest.raises(AnalysisInputError, match="shuffles is 0"):
        transition_strength(small, "run", shuffles=0)
    for analysis in (expert_transitions, transition_strength):
        with pytest.raises(AnalysisInputError, match="distance is 0"):
            analysis(small, "run", distance=0)
        with pytest.raises(AnalysisInputError, match=r"selected are 0 \(mlp\), 3 \(mlp\)"):
            analysis(small, "run", distance=2)
        with pytest.raises(AnalysisInputError, match="no field 'units'"):
            analysis(small, "run", unit="units")
    monkeypatch.setattr(pair_counts, "MOST_ROWS", 11)
    with pytest.raises(AnalysisInputError, match=r"12 rows, more than 11; .* --layers"):
        expert_transitions(small, "run")


def test_top1_needs_ranks(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    shapes = [lab.Shape(layer=layer, num_experts=2, top_k=2) for layer in (0, 3)]
    store = make_store(shapes, [two_layers(lab, [([0, 1], [1, 0])])])
    lab.edit(store, "UPDATE routing_arrays SET is_ranked = FALSE")
    assert len(expert_transitions(store, "run", slots="topk").frame) == 4
    with pytest.raises(AnalysisInputError, match="which slots top1 needs"):
        expert_transitions(store, "run")
    with pytest.raises(AnalysisInputError, match="which transition-strength needs"):
        transition_strength(store, "run")


def test_the_registry_offers_each_analysis(small: Store) -> None:
    offered = {analysis.name: analysis for analysis in PAIR_ANALYSES}
    for name in ("transitions", "transition-strength"):
        table = offered[name].function(small, "run", **offered[name].parse({"distance": "1"}))
        assert table.name == name


def test_real_routing_against_the_raw_files(real_store: Store) -> None:
    filters = Filters(layers=(13, 14), fields={"domain": ("law",)})
    used: list[Any] = []
    for number in (13, 14):
        lines = (DATA / "law" / f"expert_weights_{number}.txt").read_text().splitlines()
        ids, weights = (
            np.concatenate([np.array(line.split("\t\t")[half].split("\t")) for line in lines])
            for half in (0, 1)
        )
        chosen, weight = ids.astype(int).reshape(-1, 6), weights.astype(float).reshape(-1, 6)
        used.append(np.take_along_axis(chosen, np.lexsort((chosen, -weight), axis=1), axis=1))
    slots: Any
    for slots, kept in (("top1", 1), ("topk", 6)):
        counts = np.zeros((64, 64), dtype=int)
        for i in range(kept):
            for j in range(kept):
                np.add.at(counts, (used[0][:, i], used[1][:, j]), 1)
        frame = expert_transitions(real_store, "real", slots=slots, filters=filters).frame
        assert frame["num_pairs"].sum() == 8_327 * kept**2
        assert (frame["num_pairs"] == counts[frame["expert"], frame["successor"]]).all()
    (row,) = transition_strength(real_store, "real", filters=filters).frame.to_dict("records")
    best, base, information = measures(*(experts[:, 0].tolist() for experts in used))
    assert row["best_successor_share"] == pytest.approx(best)
    assert row["base_rate"] == pytest.approx(base)
    assert row["mutual_information"] == pytest.approx(information)
    assert 0 < row["information_chance"] < row["excess_low"]
