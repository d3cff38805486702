"""Every two languages, scores of languages, and experts above a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probe.analysis import (
    Filters,
    delta_experts,
    language_divergence,
    language_pairs,
    language_scores,
)
from moescope.probe.analysis.languages.scores import _correlations
from moescope.probe.errors import AnalysisInputError
from moescope.probe.figures import language_tree, score_curves
from moescope.probe.storage.store import Store

LN2 = float(np.log(2))
LANGUAGES = {"de": 1, "el": 4, "en": 0, "es": 0, "fr": 1, "ru": 4}
OUTCOMES = {"de": "correct", "fr": "correct", "es": "correct", "el": "other", "ru": "other"}


@pytest.fixture(scope="module")
def planted(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """Three pairs of languages, each pair on an expert of its own; de and fr share with en half."""
    items = []
    for pair, length in (("p0", 4), ("p1", 4)):
        for lang, expert in LANGUAGES.items():
            experts = [[expert]] * length
            if lang in ("de", "fr"):
                experts[: length // 2] = [[0]] * (length // 2)
            fields = {"lang": lang, "pair_id": pair, "outcome": OUTCOMES.get(lang)}
            items.append(lab.Item(tokens=lab.tokens_of(experts), fields=fields))
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items))


def test_pairs_by_hand(planted: Store) -> None:
    table = language_pairs(planted, "run", floor="none", bootstrap=10)
    jsd = table.frame.set_index(["lang_a", "lang_b"])["jsd"]
    assert len(jsd) == 15
    # q = (1, 0) against (1/2, 1/2): H(3/4, 1/4) - ln(2)/2.
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) - LN2 / 2
    assert jsd["de", "en"] == jsd["de", "es"] == pytest.approx(expected)
    assert jsd["de", "fr"] == jsd["el", "ru"] == jsd["en", "es"] == 0
    assert jsd["el", "en"] == jsd["de", "ru"] == pytest.approx(LN2)
    assert table.context.num_prompts == 12


@pytest.mark.parametrize("q", ["topk", "counts"])
def test_pairs_agree_with_the_divergence_from_a_pivot(planted: Store, q: str) -> None:
    pairs = language_pairs(planted, "run", q=q, bootstrap=10).frame
    pivot = language_divergence(planted, "run", q=q, pivot="de", bootstrap=10).frame
    of_pivot = pairs[pairs["lang_a"] == "de"].reset_index(drop=True)
    assert of_pivot["lang_b"].tolist() == pivot["lang"].tolist()
    for name in ("jsd", "d_hjs", "jsd_floor", "jsd_excess", "num_passages"):
        np.testing.assert_allclose(of_pivot[name], pivot[name])


def test_the_tree_joins_languages_on_one_expert_first(planted: Store) -> None:
    table = language_pairs(planted, "run", floor="none", bootstrap=10)
    figure = language_tree(table, 0)
    order = list(figure.layout.xaxis.ticktext)
    for first, second in (("de", "fr"), ("en", "es"), ("el", "ru")):
        assert abs(order.index(first) - order.index(second)) == 1
    joins = sorted(max(trace.x) for trace in figure.data[1:])
    assert joins[:3] == [0, 0, 0]
    assert joins[3] < joins[4] == pytest.approx(LN2)
    with pytest.raises(AnalysisInputError, match="no layer 7; it has 0"):
        language_tree(table, 7)


def test_languages_without_shared_passages_are_refused(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [
        lab.Item(tokens=lab.tokens_of([[0]]), fields={"lang": lang, "pair_id": lang})
        for lang in ("de", "en")
    ]
    store = make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items)
    with pytest.raises(AnalysisInputError, match="no two prompts with the same pair_id"):
        language_pairs(store, "run")


def test_scores_of_languages_by_hand(planted: Store) -> None:
    table = language_scores(planted, "run", measure="jsd", floor="none")
    row = table.frame.iloc[0]
    # Divergence from en: es 0, de and fr a little, el and ru ln 2; the latter two are never right.
    a = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) - LN2 / 2
    divergence, score = np.array([a, LN2, 0, a, LN2]), np.array([1, 0, 1, 1, 0])
    expected = np.corrcoef(divergence, score)[0, 1]
    assert row["pearson"] == pytest.approx(expected)
    assert row["low"] < row["pearson"] < row["high"] < 0
    assert row["num_languages"] == 5
    # One of the ten ways to choose the two languages that are never right is as extreme.
    assert row["p"] == row["p_max"] == pytest.approx(0.1)
    assert "score" not in score_curves(table).layout.title.text.split("against")[0]
    given = language_scores(
        planted, "run", measure="jsd", floor="none",
        scores=dict(zip(("de", "el", "es", "fr", "ru"), score.tolist(), strict=True)),
    )  # fmt: skip
    assert given.frame.iloc[0]["pearson"] == pytest.approx(expected)


def test_scores_from_a_file_say_what_is_wrong(planted: Store, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("lang,score\nde,0.5\nel,much\n")
    with pytest.raises(AnalysisInputError, match=r"scores\.csv, line 3"):
        language_scores(planted, "run", scores=str(path))
    path.write_text("language,score\nde,0.5\n")
    with pytest.raises(AnalysisInputError, match="must have the columns lang and score"):
        language_scores(planted, "run", scores=path)
    with pytest.raises(AnalysisInputError, match="needs 4 languages beside 'en'"):
        language_scores(planted, "run", scores={"de": 1.0, "fr": 0.0})


@settings(deadline=None, max_examples=20)
@given(st.integers(4, 6), st.integers(0, 10_000))
def test_p_of_a_correlation_counts_all_assignments(number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    divergence, score = rng.normal(size=(3, number)), rng.normal(size=number)
    found = _correlations(divergence, score, rng)
    every = np.array(
        [
            [np.corrcoef(row, score[list(order)])[0, 1] for row in divergence]
            for order in permutations(range(number))
        ]
    )
    observed = np.array([np.corrcoef(row, score)[0, 1] for row in divergence])
    np.testing.assert_allclose(found["pearson"], observed, atol=1e-12)
    far = np.abs(observed) - 1e-9
    np.testing.assert_allclose(found["p"], (np.abs(every) >= far).mean(axis=0))
    strongest = np.abs(every).max(axis=1)
    np.testing.assert_allclose(found["p_max"], [(strongest >= one).mean() for one in far])
    assert (found["p_max"] >= found["p"]).all()


def test_a_score_that_does_not_vary_has_no_correlation(planted: Store) -> None:
    same = dict.fromkeys(("de", "el", "es", "fr", "ru"), 0.5)
    frame = language_scores(planted, "run", measure="jsd", floor="none", scores=same).frame
    assert frame[["pearson", "low", "high", "spearman", "p", "p_max"]].isna().all(axis=None)


def test_experts_above_tau_by_hand(planted: Store) -> None:
    table = delta_experts(planted, "run", reference="en", tau=0.6, bootstrap=50)
    frame = table.frame.set_index(["value", "expert"])
    assert frame.at[("el", 4), "delta"] == 1
    assert frame.at[("de", 1), "delta"] == frame.at[("fr", 1), "delta"] == 0.5
    assert frame.at[("el", 0), "delta"] == -1
    assert (frame.loc["es", "delta"] == 0).all()
    above = frame.index[frame["above"]].tolist()
    assert sorted(above) == [("el", 4), ("ru", 4)]
    # All passages are alike, so resampling them changes nothing.
    assert (frame["low"] == frame["delta"]).all()
    assert (frame["high"] == frame["delta"]).all()
    assert table.summary["above tau in el"] == 1
    assert table.summary["above tau in de"] == 0
    assert set(frame["num_units"]) == {2}


def test_every_prompt_counts_alike(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    """A long prompt without the expert weighs no more than a short one with it."""
    texts = [("a", [[0]] * 2), ("a", [[1]] * 8), ("b", [[1]] * 5)]
    items = [
        lab.Item(tokens=lab.tokens_of(experts), fields={"domain": domain})
        for domain, experts in texts
    ]
    store = make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items)
    frame = delta_experts(store, "run", by="domain", reference="b").frame
    row = frame[frame["expert"] == 0].iloc[0]
    assert (row["rate"], row["rate_reference"], row["delta"]) == (0.5, 0, 0.5)
    assert row["low"] <= 0.5 <= row["high"]


def test_an_unknown_reference_is_refused(planted: Store) -> None:
    with pytest.raises(AnalysisInputError, match="reference 'xx' must be one of"):
        delta_experts(planted, "run", reference="xx", filters=Filters())
