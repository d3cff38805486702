"""Divergence of languages: by hand, by brute force, against planted structure and its floors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.probe.analysis import Filters, language_divergence
from moescope.probe.analysis.language_floor import nearest_in_length
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

LN2 = float(np.log(2))


def item(lab: SimpleNamespace, lang: str, pair_id: str | None, experts: list[list[int]]) -> Any:
    return lab.Item(tokens=lab.tokens_of(experts), fields={"lang": lang, "pair_id": pair_id})


@pytest.fixture(scope="module")
def disjoint(make_store: Callable[..., Store], lab: SimpleNamespace) -> Store:
    """English always on expert 0, German on 1, French on 0; two passages of 4 and 6 tokens."""
    items = [
        item(lab, lang, pair, [[expert]] * length)
        for pair, length in (("p0", 4), ("p1", 6))
        for lang, expert in (("en", 0), ("de", 1), ("fr", 0))
    ]
    return make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items)


@pytest.mark.parametrize("q", ["softmax", "topk", "counts"])
def test_disjoint_languages_by_hand(disjoint: Store, q: str) -> None:
    table = language_divergence(disjoint, "run", q=q)
    frame = table.frame.set_index("lang")
    assert frame["jsd"].tolist() == pytest.approx([LN2, 0])
    assert frame["d_hjs"].tolist() == pytest.approx([LN2 / np.log(8), 0])
    assert frame["jsd_floor"].tolist() == [0, 0]
    assert frame["jsd_excess"].tolist() == pytest.approx([LN2, 0])
    assert frame.at["de", "jsd_low"] == frame.at["de", "jsd_high"] == pytest.approx(LN2)
    assert frame["num_passages"].tolist() == [2, 2]
    assert frame["num_prompts"].tolist() == [4, 4]
    assert frame["num_tokens"].tolist() == frame["num_tokens_pivot"].tolist() == [10, 10]
    floor = "other_passages" if q == "softmax" else "halves"
    assert table.context.parameters["floor"] == floor
    # Samples of halves hold half of 4 and half of 6 tokens; without subsampling all of them.
    assert frame["tokens_compared"].tolist() == pytest.approx(
        [5 / (1 if q == "softmax" else 2)] * 2
    )


def brute_divergence(items: list[Any], lang: str, layer: int, q: str) -> tuple[float, float]:
    """Mean over passages of JSD and D_HJS on content prompt tokens, one passage at a time."""

    def distribution(found: Any) -> np.ndarray:
        total = np.zeros(8)
        for token in found.tokens:
            if token.phase != "prompt" or token.segment == "template" or token.is_special:
                continue
            if q == "softmax":
                total += token.scores[layer]
            for expert, weight in token.slots[layer] if q != "softmax" else ():
                total[expert] += weight if q == "topk" else 1
        return total / total.sum()

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    jsd, normalized = [], []
    for number in range(24):
        p, r = (
            distribution(next(x for x in items if x.fields["lang"] == language
                              and x.fields["pair_id"] == f"p{number}"))
            for language in ("en", lang)
        )  # fmt: skip
        mean_entropy = (entropy(p) + entropy(r)) / 2
        jsd.append(entropy((p + r) / 2) - mean_entropy)
        normalized.append(jsd[-1] / (np.log(8) - mean_entropy))
    return float(np.mean(jsd)), float(np.mean(normalized))


@pytest.mark.parametrize("q", ["softmax", "topk", "counts"])
def test_divergences_by_brute_force(random_store: Store, random_items: list[Any], q: str) -> None:
    frame = language_divergence(random_store, "run", q=q, bootstrap=50).frame
    assert frame[["lang", "layer"]].to_numpy().tolist() == [
        [lang, layer] for lang in ("de", "zh") for layer in (1, 2, 4)
    ]
    for row in frame.to_dict("records"):
        expected = brute_divergence(random_items, row["lang"], row["layer"], q)
        assert (row["jsd"], row["d_hjs"]) == pytest.approx(expected, rel=1e-4)
        assert row["jsd_low"] <= row["jsd"] <= row["jsd_high"]
        assert row["num_passages"] == 24


def test_without_language_structure_the_excess_is_near_zero(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Languages that differ in length only: raw divergence is far from 0, the excess is not."""
    rng = np.random.default_rng(5)
    shapes = [lab.Shape(layer=0, num_experts=8, top_k=2)]
    items = [
        lab.random_item(rng, shapes, {("prompt", "user", False): length}, lang=lang,
                        pair_id=f"p{number}")
        for number in range(60)
        for lang, length in (("en", 20), ("xx", 8))
    ]  # fmt: skip
    store = make_store(shapes, items)
    for q in ("topk", "counts"):
        row = language_divergence(store, "run", q=q).frame.iloc[0]
        assert row["jsd"] > 0.05
        assert row["jsd_floor"] > 0.1
        assert row["excess_low"] < 0 < row["excess_high"]
        assert abs(row["jsd_excess"]) < 0.02
        assert row["tokens_compared"] == 4


def test_planted_layers_stand_out(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    """German prefers experts 4 to 7 in layer 0 only."""
    rng = np.random.default_rng(6)
    shapes = [lab.Shape(layer=layer, num_experts=8, top_k=1) for layer in (0, 1)]
    items = []
    for number in range(20):
        for lang in ("en", "de"):
            tokens = []
            for _ in range(16):
                planted = 4 * (lang == "de") * (rng.random() < 0.8)
                slots = {0: [(int(rng.integers(4) + planted), 1.0)],
                         1: [(int(rng.integers(8)), 1.0)]}  # fmt: skip
                tokens.append(lab.Token(slots=slots))
            items.append(lab.Item(tokens=tokens, fields={"lang": lang, "pair_id": f"p{number}"}))
    frame = language_divergence(make_store(shapes, items), "run").frame.set_index("layer")
    assert frame.at[0, "excess_low"] > 0.1
    assert frame.at[1, "excess_low"] < 0 < frame.at[1, "excess_high"]


def test_other_passages_are_the_floor_where_tokens_are_unknown(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Both passages of each language use other experts: content differs as much as language."""
    items = [
        item(lab, lang, pair, [[expert]] * 3)
        for pair, experts in (("p0", (0, 1)), ("p1", (2, 3)))
        for lang, expert in zip(("en", "de"), experts, strict=True)
    ]
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=1)]
    store = make_store(shapes, items, record_level="usage")
    table = language_divergence(store, "run")
    row = table.frame.iloc[0]
    assert table.context.parameters["floor"] == "other_passages"
    assert (row["jsd"], row["jsd_floor"], row["jsd_excess"]) == pytest.approx((LN2, LN2, 0))
    assert "nearest in length" in table.notes[-1]
    with pytest.raises(AnalysisInputError, match="which floor halves needs"):
        language_divergence(store, "run", floor="halves")
    without = language_divergence(store, "run", floor="none").frame
    assert without[["jsd_floor", "jsd_excess", "excess_low", "d_floor"]].isna().all(axis=None)


def test_nearest_in_length_by_hand() -> None:
    assert nearest_in_length(np.array([10.0, 3.0, 4.0, 9.0])).tolist() == [3, 2, 1, 0]
    assert nearest_in_length(np.array([5.0, 5.0])).tolist() == [1, 0]
    assert nearest_in_length(np.array([1.0, 2.0, 3.0])).tolist() == [1, 2, 1]


def test_one_passage_has_no_interval(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [item(lab, "en", "p0", [[0], [1]]), item(lab, "de", "p0", [[1], [1]])]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    row = language_divergence(store, "run").frame.iloc[0]
    assert row["num_passages"] == 1
    assert row[["jsd_low", "jsd_high", "excess_low"]].isna().all()
    assert row["jsd_floor"] >= 0
    lonely = language_divergence(store, "run", floor="other_passages").frame.iloc[0]
    assert np.isnan(lonely["jsd_floor"])


def test_passages_too_short_to_halve_have_no_floor(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [item(lab, lang, "p0", [[0]]) for lang in ("en", "de")]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    row = language_divergence(store, "run").frame.iloc[0]
    assert row["jsd"] == 0
    assert row[["jsd_compared", "jsd_floor", "jsd_excess"]].isna().all()


def test_what_is_left_out_or_pooled_is_noted(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [
        item(lab, "en", "p0", [[0]]),
        item(lab, "en", "p0", [[1]]),
        item(lab, "de", "p0", [[0], [1]]),
        item(lab, "fr", "p9", [[0]]),
        item(lab, "de", None, [[3]]),
    ]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    table = language_divergence(store, "run")
    assert table.frame["lang"].tolist() == ["de"]
    assert table.frame.at[0, "jsd"] == 0
    assert table.notes[:3] == (
        "Prompts without lang or pair_id, left out: 1.",
        "Languages that share no pair_id with en: fr.",
        "Passages with several prompts in one language, pooled: 1.",
    )
    assert table.context.num_prompts == 3


def test_samples_and_intervals_are_seeded(random_store: Store) -> None:
    one, same, other = (
        language_divergence(random_store, "run", seed=seed, bootstrap=50).frame
        for seed in (1, 1, 2)
    )
    assert one.equals(same)
    assert one["jsd"].equals(other["jsd"])
    assert not one["jsd_floor"].equals(other["jsd_floor"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pivot": "fr"}, "pivot language 'fr'; it has de, en, zh"),
        ({"q": "logits"}, "q is 'logits'"),
        ({"floor": "half"}, "floor is 'half'"),
        ({"floor": "halves", "q": "softmax"}, "not recorded for q softmax"),
        ({"bootstrap": 0}, "bootstrap is 0"),
        ({"filters": Filters(tokens="span"), "q": "softmax"}, "router scores are summed"),
        ({"filters": Filters(fields={"lang": ("en",)})}, "no two prompts with the same pair_id"),
    ],
)
def test_bad_parameters_are_refused(random_store: Store, changes: Any, match: str) -> None:
    with pytest.raises(AnalysisInputError, match=match):
        language_divergence(random_store, "run", **changes)


def test_scores_that_were_not_recorded_are_refused(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [item(lab, lang, "p0", [[0], [1]]) for lang in ("en", "de")]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    from moescope.probe.storage.locks import writing

    with writing(store.path) as con:
        con.execute("UPDATE usage_arrays SET prob_sum = []").fetchall()
    with pytest.raises(AnalysisInputError, match="does not hold prob_sum for all 4 experts"):
        language_divergence(store, "run", q="softmax")
    assert language_divergence(store, "run", q="counts").frame.at[0, "num_passages"] == 1
