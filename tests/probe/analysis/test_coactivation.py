"""Co-activation and partners: by hand, against loops over rows, with planted pairs."""

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

from moescope.probe.analysis import token_slots
from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.pairs import pair_counts
from moescope.probe.analysis.pairs.coactivation import expert_coactivation
from moescope.probe.analysis.pairs.entries import PAIR_ANALYSES
from moescope.probe.analysis.pairs.partners import expert_partners
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

DATA = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """K = 2, E = 5, expert 4 unused. Experts 0..3 are used by 4, 3, 2 and 1 of 5 tokens."""
    items = [
        lab.Item(tokens=lab.tokens_of([[0, 1], [1, 0], [0, 2]])),
        lab.Item(tokens=lab.tokens_of([[0, 1], [2, 3]])),
    ]
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=5, top_k=2)], items))


def test_shares_by_hand(small: Store) -> None:
    table = expert_coactivation(small, "run")
    frame = table.frame.set_index(["expert", "other"])
    assert len(frame) == 5 * 4
    assert frame.at[(0, 1), "num_both"] == frame.at[(1, 0), "num_both"] == 3
    assert frame.at[(0, 1), "share"] == 0.75
    assert frame.at[(1, 0), "share"] == 1
    # The other slot of expert 0's tokens, by load: .6 of the 2 - .8 slots that are not its own.
    assert frame.at[(0, 1), "expected"] == pytest.approx(0.6 / 1.2)
    assert frame.at[(0, 1), "lift"] == pytest.approx(1.5)
    assert frame.at[(0, 3), "share"] == frame.at[(0, 3), "lift"] == 0
    assert frame.at[(0, 1), "num_slots"] == 4
    assert frame.at[(3, 2), "num_units"] == 1
    assert frame.at[(0, 1), "num_units"] == frame.at[(0, 1), "num_prompts"] == 2
    assert frame.at[(0, 1), "num_tokens"] == 5
    # One prompt uses expert 3, so nothing says how sure its share is.
    assert np.isnan(frame.at[(3, 2), "low"])
    assert (table.context.num_tokens, table.context.num_prompts) == (5, 2)


def test_an_unused_expert_has_no_shares(small: Store) -> None:
    frame = expert_coactivation(small, "run").frame.set_index(["expert", "other"])
    unused = frame.loc[4]
    assert unused[["share", "low", "high", "lift"]].isna().all(axis=None)
    assert unused["num_slots"].tolist() == [0, 0, 0, 0]
    # Nobody is expected to be selected with it, and nobody is.
    assert frame.at[(0, 4), "share"] == frame.at[(0, 4), "expected"] == 0
    assert np.isnan(frame.at[(0, 4), "lift"])


def test_partners_by_hand(small: Store) -> None:
    table = expert_partners(small, "run")
    frame = table.frame.set_index("expert")
    # Expert 2 has one token with 0 and one with 3: the lower id is its partner.
    assert frame["partner"].tolist()[:4] == [1, 0, 0, 2]
    assert frame["mutual"].tolist()[:4] == [True, True, False, False]
    assert frame["share"].tolist()[:4] == [0.75, 1, 0.5, 1]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    effective = frame["effective_partners"].tolist()
    assert effective[:4] == pytest.approx([math.exp(entropy), 1, 2, 1])
    # By load expert 0 is with 1, 2 and 3 as 3 to 2 to 1.
    parts = [1 / 2, 1 / 3, 1 / 6]
    chance = math.exp(-sum(part * math.log(part) for part in parts))
    assert frame.at[0, "effective_partners_chance"] == pytest.approx(chance)
    assert frame["top3_share"].tolist()[:4] == pytest.approx([1] * 4)
    assert frame.at[3, "top3_share_chance"] == pytest.approx(1)
    missing = ["partner", "share", "expected", "lift", "mutual", "effective_partners", "top3_share"]
    assert frame.loc[4, missing].isna().all()
    assert table.summary["experts_without_partner"] == 1
    assert table.summary["share_of_mutual_partners"] == 0.5
    assert table.summary["median_effective_partners"] == np.median(effective[:4])


def test_adjacent_pairs_are_neighbors_in_rank(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    token = lab.Token(slots={0: [(4, 0.1), (1, 0.6), (0, 0.3)]})
    store = make_store([lab.Shape(layer=0, num_experts=5, top_k=3)], [lab.Item(tokens=[token])])
    table = expert_coactivation(store, "run", pairs="adjacent")
    both = table.frame[table.frame["num_both"] > 0]
    pairs = set(zip(both["expert"], both["other"], strict=True))
    assert pairs == {(1, 0), (0, 1), (0, 4), (4, 0)}
    assert "neighbors in rank order" in table.title
    assert any("released with OLMoE" in note for note in table.notes)
    shares = table.frame.groupby("expert")["share"].sum(min_count=1)
    expected = table.frame.groupby("expert")["expected"].sum()
    assert shares.dropna().mean() == pytest.approx(2 * 2 / 3)
    assert expected.to_numpy() == pytest.approx([4 / 3] * 5)


def routed(store: Store) -> dict[tuple[int, int], dict[int, list[tuple[int, int]]]]:
    """(prompt, position) -> layer -> (rank, expert) of the content tokens, row by row."""
    rows = store.query(
        "SELECT prompt_id, position, layer, rank, expert FROM routing JOIN tokens "
        "USING (run_id, prompt_id, position) WHERE NOT is_special AND segment != 'template'"
    )
    found: dict[Any, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows.itertuples(index=False):
        found[row.prompt_id, row.position][row.layer].append((row.rank, row.expert))
    return {key: {layer: sorted(v) for layer, v in found[key].items()} for key in sorted(found)}


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_the_table_is_that_of_plain_loops(random_store: Store, pairs: Any) -> None:
    units = random_store.query("SELECT prompt_id, pair_id FROM prompts")
    unit_of = dict(zip(units["prompt_id"], units["pair_id"], strict=True))
    both: dict[Any, Counter[str]] = defaultdict(Counter)
    users: dict[Any, Counter[str]] = defaultdict(Counter)
    num_tokens: Counter[int] = Counter()
    for (prompt, _), layers in routed(random_store).items():
        for layer, slots in layers.items():
            num_tokens[layer] += 1
            for rank, expert in slots:
                users[layer, expert][unit_of[prompt]] += 1
                for other_rank, other in slots:
                    far = abs(rank - other_rank)
                    if far == 1 or (far and pairs == "all"):
                        both[layer, expert, other][unit_of[prompt]] += 1
    frame = expert_coactivation(random_store, "run", pairs=pairs).frame
    assert len(frame) == 3 * 8 * 7
    for row in frame.to_dict("records"):
        layer, expert, other = row["layer"], row["expert"], row["other"]
        n, d = both[layer, expert, other], users[layer, expert]
        assert row["num_both"] == n.total()
        assert row["num_slots"] == d.total()
        share = n.total() / d.total()
        assert row["share"] == pytest.approx(share)
        loads = {e: users[layer, e].total() for e in range(8)}
        free = sum(loads.values()) - loads[expert]
        assert row["expected"] == pytest.approx(loads[other] / free)  # one other slot
        variance = sum((n[u] - share * d[u]) ** 2 for u in d) * len(d) / (len(d) - 1)
        reach = stats.t.ppf(0.975, len(d) - 1) * math.sqrt(variance) / d.total()
        assert row["low"] == pytest.approx(max(share - reach, 0))
        assert row["high"] == pytest.approx(min(share + reach, 1))
        assert (row["num_units"], row["num_tokens"]) == (len(d), num_tokens[layer])


def test_partners_follow_from_the_pairs(random_store: Store) -> None:
    pairs = expert_coactivation(random_store, "run").frame
    table = expert_partners(random_store, "run")
    for row in table.frame.to_dict("records"):
        own = pairs[(pairs["layer"] == row["layer"]) & (pairs["expert"] == row["expert"])]
        best = own.loc[own["share"].idxmax()]
        assert row["partner"] == best["other"]
        for name in ("share", "low", "high", "expected", "lift", "num_units"):
            assert row[name] == pytest.approx(best[name])
        parts = own["num_both"] / own["num_both"].sum()
        assert row["top3_share"] == pytest.approx(parts.nlargest(3).sum())
        known = parts[parts > 0]
        assert row["effective_partners"] == pytest.approx(math.exp(-(known * np.log(known)).sum()))
        assert row["effective_low"] < row["effective_partners"] < row["effective_high"]
        assert row["effective_partners"] < row["effective_partners_chance"] <= 7


@pytest.mark.parametrize(("unit", "sorting"), [("pair_id", 0), ("pair_id", 10**9), ("key", 10**9)])
def test_no_way_of_counting_changes_the_counts(
    random_store: Store, monkeypatch: pytest.MonkeyPatch, unit: str, sorting: int
) -> None:
    """No prompt has a key, so each is a unit; prompts of a pair_id do not stand together."""

    def tables() -> list[pd.DataFrame]:
        made = [
            expert_coactivation(random_store, "run", unit=unit).frame,
            expert_partners(random_store, "run", unit=unit).frame,
        ]
        return [frame.drop(columns="kind").astype(float) for frame in made]

    usual = tables()
    monkeypatch.setattr(token_slots, "SLOTS_PER_READ", 400)
    monkeypatch.setattr(pair_counts, "CELLS_PER_SORTED_PAIR", sorting)
    monkeypatch.setattr(pair_counts, "CELLS_PER_STEP", 1_000)
    monkeypatch.setattr(pair_counts, "PAIRS_PER_STEP", 300)
    for before, after in zip(usual, tables(), strict=True):
        pd.testing.assert_frame_equal(before, after, rtol=1e-12)


TOKENS = st.lists(
    st.lists(st.permutations(range(6)).map(lambda experts: experts[:3]), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@settings(max_examples=5, deadline=None)
@given(prompts=TOKENS, names=st.permutations(range(6)))
def test_sums_symmetry_and_names(
    make_store: Callable[..., Store], lab: SimpleNamespace, prompts: Any, names: list[int]
) -> None:
    """Layer 1 routes as layer 0 does, with other names for the experts."""
    items = [
        lab.Item(
            tokens=[
                lab.Token(slots={0: [(e, 1 / 3) for e in experts],
                                 1: [(names[e], 1 / 3) for e in experts]})
                for experts in tokens
            ]
        )
        for tokens in prompts
    ]  # fmt: skip
    shapes = [lab.Shape(layer=layer, num_experts=6, top_k=3) for layer in (0, 1)]
    both = expert_coactivation(make_store(shapes, items), "run").frame
    frame, renamed = (
        both[both["layer"] == layer].drop(columns=["layer", "kind"]) for layer in (0, 1)
    )
    frame = frame.set_index(["expert", "other"]).sort_index()
    num_tokens = sum(map(len, prompts))
    assert frame["num_both"].sum() == 3 * 2 * num_tokens
    swapped = frame["num_both"].swaplevel().reindex(frame.index)
    assert (frame["num_both"].to_numpy() == swapped.to_numpy()).all()
    used = frame[frame["num_slots"] > 0]
    np.testing.assert_allclose(used.groupby("expert")["share"].sum(), 2)
    np.testing.assert_allclose(frame.groupby("expert")["expected"].sum(), 2)
    assert (used["expected"] <= 1 + 1e-12).all()
    assert not (used["low"] > used["share"]).any()
    assert not (used["high"] < used["share"]).any()
    for name in ("expert", "other"):
        renamed[name] = [names.index(e) for e in renamed[name]]
    pd.testing.assert_frame_equal(frame, renamed.set_index(["expert", "other"]).sort_index())


def test_planted_partners_are_found_and_no_others(planted_store: Store) -> None:
    pairs = expert_coactivation(planted_store, "run").frame
    always = pairs[pairs["share"] == 1]
    assert [tuple(row) for row in always[["layer", "expert", "other"]].to_numpy()] == [
        (2, 3, 11),
        (2, 11, 3),
    ]
    assert (always["low"] == 1).all()
    # Who is a partner of these two in other layers comes nowhere near.
    assert pairs["share"].drop(always.index).max() < 0.7
    frame = expert_partners(planted_store, "run").frame
    sure = frame[(frame["share"] == 1) & frame["mutual"]]
    assert [tuple(row) for row in sure[["layer", "expert", "partner"]].to_numpy()] == [
        (2, 3, 11),
        (2, 11, 3),
    ]
    others = frame[(frame["layer"] == 2) & ~frame["expert"].isin([3, 11])]
    assert sure["effective_high"].max() < others["effective_low"].min()
    assert sure["top3_share"].min() > others["top3_share"].max()


def test_without_structure_lift_is_one(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Uniform top-4 of 10: every share is 3/9, and the intervals cover it at their rate."""
    rng = np.random.default_rng(3)
    items = [
        lab.Item(tokens=lab.tokens_of([rng.permutation(10)[:4].tolist() for _ in range(20)]))
        for _ in range(60)
    ]
    store = make_store([lab.Shape(layer=0, num_experts=10, top_k=4)], items)
    frame = expert_coactivation(store, "run").frame
    assert frame["lift"].mean() == pytest.approx(1, abs=0.01)
    covered = (frame["low"] <= 1 / 3) & (frame["high"] >= 1 / 3)
    assert covered.mean() > 0.85
    partners = expert_partners(store, "run").frame
    np.testing.assert_allclose(
        partners["effective_partners"], partners["effective_partners_chance"], rtol=0.02
    )


def test_tokens_may_have_fewer_slots(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    tokens = lab.tokens_of([[0], [0, 1, 2], [1]])
    store = make_store([lab.Shape(layer=0, num_experts=3, top_k=3)], [lab.Item(tokens=tokens)])
    frame = expert_coactivation(store, "run").frame.set_index(["expert", "other"])
    assert frame["num_both"].tolist() == [1] * 6
    assert frame["share"].tolist() == [0.5, 0.5, 0.5, 0.5, 1, 1]


def test_what_cannot_be_answered_is_refused(
    small: Store, make_store: Callable[..., Store], lab: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(AnalysisInputError, match="pairs is 'some'; it is one of all, adjacent"):
        expert_coactivation(small, "run", pairs="some")  # type: ignore[arg-type]
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    items = [lab.Item(tokens=lab.tokens_of([[0], [1]]))]
    for analysis in (expert_coactivation, expert_partners):
        with pytest.raises(AnalysisInputError, match="no field 'units'"):
            analysis(small, "run", unit="units")
        with pytest.raises(AnalysisInputError, match=r"no counted token .* two experts"):
            analysis(make_store(shapes, items), "run")
        with pytest.raises(AnalysisInputError, match="no routing per token"):
            analysis(make_store(shapes, items, record_level="usage"), "run")
    monkeypatch.setattr(pair_counts, "MOST_ROWS", 19)
    with pytest.raises(AnalysisInputError, match=r"20 rows, more than 19; .* --layers"):
        expert_coactivation(small, "run")


def test_top1_layers_beside_others_are_left_out(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    shapes = [lab.Shape(layer=layer, num_experts=3, top_k=1 + layer) for layer in (0, 1)]
    token = lab.Token(slots={0: [(0, 1.0)], 1: [(1, 0.5), (2, 0.5)]})
    table = expert_coactivation(make_store(shapes, [lab.Item(tokens=[token])]), "run")
    assert set(table.frame["layer"]) == {1}
    assert table.notes == ("Layers in which no token has two experts, left out: 0.",)


def test_adjacent_pairs_need_ranks(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    items = [lab.Item(tokens=lab.tokens_of([[0, 1]]))]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=2)], items)
    lab.edit(store, "UPDATE routing_arrays SET is_ranked = FALSE")
    assert len(expert_coactivation(store, "run").frame) == 2
    with pytest.raises(AnalysisInputError, match="which pairs adjacent needs"):
        expert_coactivation(store, "run", pairs="adjacent")


def test_the_registry_offers_each_analysis(small: Store) -> None:
    offered = {analysis.name: analysis for analysis in PAIR_ANALYSES}
    assert list(offered) == ["coactivation", "partners", "transitions", "transition-strength"]
    for name in ("coactivation", "partners"):
        table = offered[name].function(small, "run", **offered[name].parse({"unit": "lang"}))
        assert table.name == name
        assert table.context.parameters["unit"] == "lang"


def test_real_routing_against_the_raw_files(real_store: Store) -> None:
    filters = Filters(layers=(13,), fields={"domain": ("law",)})
    frame = expert_coactivation(real_store, "real", filters=filters).frame
    both = np.zeros((64, 64), dtype=int)
    adjacent = np.zeros((64, 64), dtype=int)
    tokens = 0
    for line in (DATA / "law" / "expert_weights_13.txt").read_text().splitlines():
        ids, weights = (np.array(half.split("\t")).reshape(-1, 6) for half in line.split("\t\t"))
        for chosen, weight in zip(ids.astype(int), weights.astype(float), strict=True):
            tokens += 1
            for i, j in itertools.permutations(chosen, 2):
                both[i, j] += 1
            ranked = chosen[np.lexsort((chosen, -weight))]
            for i, j in itertools.pairwise(ranked):
                adjacent[i, j] += 1
                adjacent[j, i] += 1
    assert tokens == 8_327
    assert frame["num_both"].sum() / 2 == tokens * 6 * 5 / 2
    assert (frame["num_both"] == both[frame["expert"], frame["other"]]).all()
    near = expert_coactivation(real_store, "real", filters=filters, pairs="adjacent").frame
    assert near["num_both"].sum() / 2 == tokens * 5
    assert (near["num_both"] == adjacent[near["expert"], near["other"]]).all()
