"""Every method of a contrast: by hand, as properties, on planted experts, as published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.analysis import Filters, expert_contrast
from moescope.probe.analysis.cells import Cells, difference, unit_interval
from moescope.probe.analysis.contrasts.methods import (
    METHODS,
    class_contrast,
    class_parts,
    cumulative,
    leading,
    log_odds,
    npmi_score,
)
from moescope.probe.analysis.contrasts.settings import check_settings, parse_markers
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

REFUSED, CORRECT = {"outcome": ["refused"]}, {"outcome": ["correct"]}
DATA = Path(__file__).resolve().parents[4] / "shared/data/deepseek_v2_lite_routing"


def by_expert(frame: pd.DataFrame, layer: int = 0) -> pd.DataFrame:
    return frame[frame["layer"] == layer].set_index("expert").sort_index()


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Store:
    """K = 1, E = 3. Pairs p0, p1 with both outcomes, one refused and one correct of their own."""
    prompts = [
        ("refused", "p0", [0]), ("refused", "p1", [0, 0, 1]), ("refused", "q", [2, 0]),
        ("correct", "p0", [1, 1]), ("correct", "p1", [1, 1, 1, 2]), ("correct", "r", [1]),
        ("broken", "p0", [2, 2]), ("broken", "p1", [2, 0]),
    ]  # fmt: skip
    items = [
        lab.Item(
            tokens=lab.tokens_of([[expert] for expert in experts]),
            fields={"outcome": outcome, "pair_id": unit, "lang": "en"},
        )
        for outcome, unit, experts in prompts
    ]
    return make_store([lab.Shape(layer=0, num_experts=3, top_k=1)], items)


def test_log_odds_by_hand(small: Store) -> None:
    frame = by_expert(
        expert_contrast(small, "run", a=REFUSED, b=CORRECT, method="log_odds", split=False).frame
    )
    # Refused: 4 of 6 tokens on expert 0, 1 on 1, 1 on 2; correct: 6 of 7 on 1, 1 on 2.
    expected = [
        math.log(4.5 / 2.5) - math.log(0.5 / 7.5),
        math.log(1.5 / 5.5) - math.log(6.5 / 1.5),
        math.log(1.5 / 5.5) - math.log(1.5 / 6.5),
    ]
    assert frame["score"].tolist() == pytest.approx(expected)
    assert frame["effect"].tolist() == pytest.approx(expected)
    assert frame["risk_difference"].tolist() == pytest.approx([4 / 6, 1 / 6 - 6 / 7, 1 / 6 - 1 / 7])


def test_paired_differences_by_hand(small: Store) -> None:
    table = expert_contrast(small, "run", a=REFUSED, b=CORRECT, method="paired", split=False)
    frame = by_expert(table.frame)
    # p0: rates (1, 0, 0) and (0, 1, 0); p1: (2/3, 1/3, 0) and (0, 3/4, 1/4). q and r stay out.
    expected = [(1 + 2 / 3) / 2, (-1 + 1 / 3 - 3 / 4) / 2, -1 / 8]
    assert frame["score"].tolist() == pytest.approx(expected)
    assert table.summary["matched_units"] == table.summary["units_a"] == 2


def test_ftri_by_hand(small: Store) -> None:
    table = expert_contrast(small, "run", a=REFUSED, method="ftri", split=False)
    frame = by_expert(table.frame)
    refused = np.mean([[1, 0, 0], [2 / 3, 1 / 3, 0], [1 / 2, 0, 1 / 2]], axis=0)
    correct = np.mean([[0, 1, 0], [0, 3 / 4, 1 / 4], [0, 1, 0]], axis=0)
    broken = np.mean([[0, 0, 1], [1 / 2, 0, 1 / 2]], axis=0)
    assert frame["score"].tolist() == pytest.approx(refused - (correct + broken) / 2)
    assert "against the mean of broken, correct" in table.title
    assert frame["num_prompts_b"].iloc[0] == 5
    sums = expert_contrast(small, "run", a=REFUSED, b=CORRECT, method="ftri", average="sum",
                           split=False)  # fmt: skip
    expected = np.array([4, 1, 1]) / 3 - np.array([0, 6, 1]) / 3
    assert by_expert(sums.frame)["score"].tolist() == pytest.approx(expected)


def test_classes_of_too_few_units_are_left_out_unless_named(small: Store) -> None:
    items = expert_contrast(small, "run", a={"outcome": ["broken"]}, method="ftri", split=False)
    assert not any("left out" in note for note in items.notes)
    filters = Filters(fields={"pair_id": ("p0", "p1", "q")})
    table = expert_contrast(small, "run", a=CORRECT, method="ftri", split=False, filters=filters)
    assert table.title.endswith("the mean of broken, refused")
    one = Filters(fields={"pair_id": ("p0", "q", "r")})
    table = expert_contrast(small, "run", a=CORRECT, method="ftri", split=False, filters=one)
    assert "Classes with fewer than 2 units, left out: broken (1)." in table.notes
    with pytest.raises(AnalysisInputError, match="class outcome=broken has 1 unit"):
        expert_contrast(small, "run", a=CORRECT, b={"outcome": ["broken", "refused"]},
                        method="ftri", split=False, filters=one)  # fmt: skip


def test_scores_of_one_group_by_hand(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """K = 2, E = 3, weights .6 and .2; four prompts of one or two tokens."""

    def token(first: int, second: int) -> Any:
        return lab.Token(slots={0: [(first, 0.6), (second, 0.2)]})

    prompts = [[token(0, 1)], [token(0, 1), token(2, 1)], [token(0, 1)], [token(0, 1)]]
    items = [lab.Item(tokens=tokens) for tokens in prompts]
    store = make_store([lab.Shape(layer=0, num_experts=3, top_k=2)], items)
    token_score = by_expert(expert_contrast(store, "run", method="esft_token", mass=0.45).frame)
    assert token_score["score"].tolist() == pytest.approx([4 / 10, 5 / 10, 1 / 10])
    assert token_score["candidate"].tolist() == [False, True, False]
    assert token_score["score_chance"].tolist() == pytest.approx([1 / 3] * 3)
    assert token_score["a1"].tolist() == [4, 5, 1]
    assert token_score[["a2", "d2", "p", "q", "risk_difference"]].isna().to_numpy().all()
    more = by_expert(expert_contrast(store, "run", method="esft_token", mass=0.51).frame)
    assert more["candidate"].tolist() == more["confirmed"].tolist() == [True, True, False]
    gate = by_expert(expert_contrast(store, "run", method="esft_gate").frame)
    assert gate["score"].tolist() == pytest.approx([2.4 / 5, 1.0 / 5, 0.6 / 5])
    assert gate["score_chance"].tolist() == pytest.approx([0.8 / 3] * 3)
    seuf = by_expert(expert_contrast(store, "run", method="seuf", candidates=1).frame)
    assert seuf["score"].tolist() == pytest.approx([(3 * 0.6 + 0.3) / 4, 0.2, 0.3 / 4])
    assert seuf["candidate"].tolist() == [True, False, False]
    assert seuf.loc[0, "low"] <= seuf.loc[0, "effect"] <= seuf.loc[0, "high"]


def test_npmi_by_hand() -> None:
    # T = 16 tokens, M = 4 at the marker. Expert 0: 3 of 4 there, 6 in all; expert 1 never there;
    # expert 2 at the marker alone; expert 3 never used.
    counts = np.array([[3.0, 0.0, 4.0, 0.0], [3.0, 5.0, 0.0, 0.0]])
    tokens = np.array([4.0, 12.0])
    found = npmi_score(np.array([1.0]))(counts, tokens)
    first = (math.log2(3 / 4) + math.log2(16 / 6)) / math.log2(16 / 3)
    assert found.tolist() == pytest.approx([first, -1.0, 1.0, math.nan], nan_ok=True)
    three = np.vstack([counts[:1], counts[:1], counts[1:]])
    both = npmi_score(np.array([1.0, -1.0]))(three, np.array([4.0, 4.0, 8.0]))
    assert both[[0, 2]].tolist() == pytest.approx([0.0, 0.0])


def marked_store(make_store: Callable[..., Store], lab: SimpleNamespace) -> Store:
    """30 prompts; at token number 7 expert 5 takes part 9 times in 10, elsewhere 1 time in 10."""
    rng = np.random.default_rng(4)
    items = []
    for _ in range(30):
        tokens = []
        for position in range(20):
            at_marker = position in (7, 13)
            planted = rng.random() < (0.9 if at_marker else 0.1)
            others = rng.permutation([e for e in range(8) if e != 5])[:2]
            chosen = [5, int(others[0])] if planted else others.tolist()
            tokens.append(
                lab.Token(slots={0: [(int(e), 0.5) for e in chosen]}, is_special=at_marker)
            )
        items.append(lab.Item(tokens=tokens))
    return make_store([lab.Shape(layer=0, num_experts=8, top_k=2)], items)


def test_markers_find_the_expert_that_stands_at_them(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    store = marked_store(make_store, lab)
    spelled = store.query("SELECT DISTINCT token FROM tokens WHERE position = 7")["token"].tolist()
    table = expert_contrast(store, "run", method="npmi", markers=spelled, candidates=4)
    first = table.frame.iloc[0]
    assert (first["expert"], first["confirmed"]) == (5, True)
    assert 0 < first["low"] < first["effect"] < first["high"] < 1
    assert first["num_tokens_a"] == 30
    # Markers count although they are special tokens; position 13 is left out as the others are.
    assert first["num_tokens_b"] == 30 * 18
    assert table.frame["confirmed"].sum() == 1
    with pytest.raises(AnalysisInputError, match="no counted token of run 'run' is '<think>'"):
        expert_contrast(store, "run", method="npmi", markers=["<think>"])


def planted_items(lab: SimpleNamespace, seed: int = 3) -> list[Any]:
    """Refused prompts use expert 5 of layer 1 in 70 % of tokens, others in 20 %; 30 pairs."""
    rng = np.random.default_rng(seed)
    items = []
    for unit in range(30):
        for outcome in ("refused", "correct", "other"):
            tokens = []
            for _ in range(int(rng.integers(6, 15))):
                slots = {}
                for layer in (0, 1):
                    others = rng.permutation([0, 1, 2, 3, 4, 6, 7])
                    share = 0.7 if outcome == "refused" else 0.2
                    planted = layer == 1 and rng.random() < share
                    chosen = [5, others[0]] if planted else others[:2]
                    slots[layer] = [(int(expert), 0.5) for expert in chosen]
                tokens.append(lab.Token(slots=slots))
            fields = {"outcome": outcome, "pair_id": f"p{unit}", "lang": "en"}
            items.append(lab.Item(tokens=tokens, fields=fields))
    return items


@pytest.fixture(scope="module")
def planted(make_store: Callable[..., Store], lab: SimpleNamespace) -> Store:
    shapes = [lab.Shape(layer=layer, num_experts=8, top_k=2) for layer in (0, 1)]
    return make_store(shapes, planted_items(lab))


@pytest.mark.parametrize(
    "how",
    [
        {"method": "log_odds"},
        {"method": "paired"},
        {"method": "ftri", "b": None},
        {"method": "ftri", "average": "sum"},
        {"method": "safex", "candidates": 2},
        {"method": "risk_difference", "measure": "weights"},
        {"method": "paired", "measure": "scores"},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_every_method_finds_a_planted_expert(planted: Store, how: dict[str, Any]) -> None:
    table = expert_contrast(
        planted, "run", **{"a": REFUSED, "b": CORRECT, "candidates": 5, "bootstrap": 200} | how
    )
    first = table.frame.iloc[0]
    assert (first["layer"], first["expert"], first["confirmed"]) == (1, 5, True)
    assert first["effect"] > 0
    assert first["low"] > 0
    assert set(table.frame.loc[table.frame["confirmed"], "layer"]) == {1}
    assert table.frame["risk_difference"].iloc[0] > 0.3


def test_safex_of_one_group(planted: Store) -> None:
    table = expert_contrast(planted, "run", a=REFUSED, method="safex", candidates=1)
    first = table.frame.iloc[0]
    assert (first["layer"], first["expert"], first["confirmed"]) == (1, 5, True)
    assert first["score"] == 1.0
    assert first["score_chance"] == 1 / 16
    assert first["effect"] == first["rate_a"]
    assert table.frame["candidate"].sum() == 1


def random_cells(seed: int, *, classes: int, units: int = 9, experts: int = 6) -> Cells:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 30, units * classes).astype(float)
    counts = rng.binomial(tokens[:, None].astype(int), rng.random((1, experts))).astype(float)
    return Cells(
        counts=counts, tokens=tokens, units=np.repeat(np.arange(units), classes),
        classes=np.tile(np.arange(classes), units), num_classes=classes,
    )  # fmt: skip


@given(st.integers(0, 10_000))
def test_exchanging_the_groups_turns_the_sign(seed: int) -> None:
    counts, tokens = random_cells(seed, classes=2).sums()
    for score in (difference, log_odds, class_contrast):
        there, back = score(counts, tokens), score(counts[::-1], tokens[::-1])
        np.testing.assert_allclose(there, -back, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_the_weighted_parts_of_ftri_have_its_effect(seed: int, classes: int) -> None:
    cells = random_cells(seed, classes=classes)
    np.testing.assert_allclose(
        class_parts(cells).effects(), cells.scored(class_contrast), atol=1e-9
    )


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_cumulative_selection_is_the_shortest_that_reaches_the_mass(seed: int, mass: float) -> None:
    rng = np.random.default_rng(seed)
    score = rng.dirichlet(np.ones(7), size=3).ravel()
    chosen = cumulative(score, np.array([0, 7, 14]), mass)
    for first in (0, 7, 14):
        own = chosen[(chosen >= first) & (chosen < first + 7)]
        assert score[own].sum() >= mass - 1e-9
        assert score[own[:-1]].sum() < mass
        others = np.setdiff1d(np.arange(first, first + 7), own)
        assert score[own].min() >= score[others].max(initial=0)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_intervals_hold_their_score_and_follow_units(seed: int) -> None:
    cells = random_cells(seed, classes=3, units=30)
    low, high = unit_interval(cells, class_contrast, 200, np.random.default_rng(0))
    effect = cells.scored(class_contrast)
    assert ((low <= effect + 1e-9) & (effect <= high + 1e-9)).mean() > 0.8
    renumbered = Cells(
        counts=cells.counts, tokens=cells.tokens, units=1000 - cells.units, classes=cells.classes,
        num_classes=3,
    )  # fmt: skip
    np.testing.assert_allclose(renumbered.scored(class_contrast), effect)


def test_ties_go_to_the_lowest_expert_and_undefined_scores_nowhere() -> None:
    score = np.array([0.2, np.nan, -0.5, 0.2, 0.0])
    assert leading(score, 3, signed=True).tolist() == [2, 0, 3]
    assert leading(score, 5, signed=False).tolist() == [0, 3]
    assert cumulative(np.array([0.25, 0.25, 0.25, 0.25]), np.array([0]), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "gradient"}, "method is 'gradient'; it is one of risk_difference, log_odds"),
        ({"method": "log_odds", "measure": "weights"}, "with method log_odds it is selections"),
        ({"method": "paired", "average": "pooled"}, "with method paired it is unit"),
        ({"method": "esft_token"}, "esft_token describes one group"),
        ({"method": "esft_token", "b": None, "mass": 0.0}, "mass is 0.0"),
        ({"method": "safex", "stability": 1.0}, "stability is 1.0"),
        ({"mass": 0.5}, "mass is a setting of esft and means nothing to method risk_difference"),
        ({"method": "ftri", "b": None, "stability": 0.5}, "stability is a setting of safex"),
        ({"method": "seuf", "b": None, "split": False}, "on all its units anyway"),
        ({"b": None}, "risk_difference compares two groups; give b too"),
        ({"a": None}, "group a has no condition"),
        ({"method": "npmi", "b": None}, "needs at least one marker"),
        ({"markers": ["x"]}, "no other method takes any"),
        ({"method": "ftri", "a": {"lang": ["en"], "outcome": ["x"]}}, "one FIELD=VALUE"),
        ({"method": "ftri", "b": {"lang": ["en"]}}, "other values of the same field"),
        ({"method": "paired", "b": {"outcome": ["nothing"]}}, "holds no prompt"),
    ],
)
def test_what_does_not_fit_a_method_is_refused(
    planted: Store, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(AnalysisInputError, match=match):
        expert_contrast(planted, "run", **{"a": REFUSED, "b": CORRECT} | changes)


def test_markers_are_read() -> None:
    assert parse_markers(["<think>", "</think>=-1", "="]) == {"<think>": 1, "</think>": -1, "=": 1}
    for bad, match in ((["a", "a=2"], "given twice"), (["a=0"], "other than 0"),
                       (["a=-1"], "no marker has a positive")):  # fmt: skip
        with pytest.raises(AnalysisInputError, match=match):
            parse_markers(bad)


def test_every_method_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert method.score.source != "moescope", name
        how = check_settings(method=name, markers=["x"] if name == "npmi" else ())
        assert (how.average, how.measure) == (method.averages[0], method.measures[0])


@pytest.mark.parametrize("task", ["law", "summary"])
def test_selections_of_esft_are_those_published(real_store: Store, task: str) -> None:
    published = json.loads((DATA / task / "expert_config.json").read_text())["experts"]
    scores = json.loads((DATA / task / "summary.json").read_text())
    filters = Filters(fields={"domain": (task,)})
    for kind in ("token", "gate"):
        table = expert_contrast(
            real_store, "real", method=f"esft_{kind}", filters=filters, bootstrap=20
        )
        frame = table.frame.set_index(["layer", "expert"])["score"]
        ours = np.array([[frame[layer, expert] for expert in range(64)] for layer in range(1, 27)])
        theirs = np.array(
            [[scores[f"{kind}_scores"][str(layer)][str(expert)] for expert in range(64)]
             for layer in range(1, 27)]
        )  # fmt: skip
        np.testing.assert_allclose(ours, theirs, atol=5.01e-5)
        if kind == "token":
            rounded = cumulative(np.round(ours, 4).ravel(), np.arange(26) * 64, 0.2)
            assert len(rounded) == {"law": 153, "summary": 128}[task]
            chosen = table.frame[table.frame["candidate"]]
            for layer in range(1, 27):
                own = chosen[chosen["layer"] == layer].sort_values(
                    ["score", "expert"], ascending=[False, True]
                )
                assert set(own["expert"]) == set(published[str(layer)]), layer
