"""Divergence of languages: by hand, by brute force, against planted structure and its floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moescope.probe.analysis import Filters, language_divergence
from moescope.probe.analysis.languages.floor import neighbors_in_length
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

LN2 = float(np.log(2))


def item(lab: SimpleNamespace, lang: str, pair_id: str | None, experts: list[list[int]]) -> Any:
    return lab.Item(tokens=lab.tokens_of(experts), fields={"lang": lang, "pair_id": pair_id})


@pytest.fixture(scope="module")
def disjoint(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """English always on expert 0, German on 1, French on 0; two passages of 4 and 6 tokens."""
    items = [
        item(lab, lang, pair, [[expert]] * length)
        for pair, length in (("p0", 4), ("p1", 6))
        for lang, expert in (("en", 0), ("de", 1), ("fr", 0))
    ]
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items))


@pytest.mark.parametrize("q", ["softmax", "topk", "counts"])
@pytest.mark.parametrize("floor", ["auto", "halves", "none"])
def test_disjoint_languages_by_hand(disjoint: Store, q: str, floor: str) -> None:
    if (q, floor) == ("softmax", "halves"):
        with pytest.raises(AnalysisInputError, match="floor halves needs the routing of single"):
            language_divergence(disjoint, "run", q=q, floor=floor)
        return
    table = language_divergence(disjoint, "run", q=q, floor=floor)
    frame = table.frame.set_index("lang")
    assert frame["jsd"].tolist() == pytest.approx([LN2, 0])
    assert frame["d_hjs"].tolist() == pytest.approx([LN2 / np.log(8), 0])
    assert frame.at["de", "jsd_low"] == frame.at["de", "jsd_high"] == pytest.approx(LN2)
    assert frame["num_passages"].tolist() == [2, 2]
    assert frame["num_prompts"].tolist() == [4, 4]
    assert frame["num_tokens"].tolist() == frame["num_tokens_pivot"].tolist() == [10, 10]
    compared = frame[["jsd_floor", "jsd_excess", "d_compared", "tokens_compared"]]
    if floor == "none":
        assert compared.isna().all(axis=None)
        assert table.notes[-1].startswith("No floor")
        return
    assert frame["jsd_floor"].tolist() == [0, 0]
    assert frame["jsd_excess"].tolist() == pytest.approx([LN2, 0])
    assert frame["d_compared"].tolist() == pytest.approx([LN2 / np.log(8), 0])
    # Passages of 4 and 6 tokens: one pair of them, or halves of 2 and 3.
    assert frame["num_compared"].tolist() == ([1, 1] if floor == "auto" else [2, 2])
    tokens = {"halves": 2.5, "auto": 5 if q == "softmax" else 4}[floor]
    assert frame["tokens_compared"].tolist() == [tokens] * 2
    assert ("equal numbers need routing rows" in table.notes[-1]) == (q == "softmax")


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


def structureless_items(lab: SimpleNamespace, shapes: Any, *, copied: bool) -> list[Any]:
    """Passages with contents of their own; `xx` is routed like `en`: in law, or token by token."""
    rng = np.random.default_rng(5)
    items = []
    for number in range(60):
        preferred = rng.permutation(8)[:4]

        def tokens(length: int, preferred: Any = preferred) -> list[Any]:
            return lab.tokens_of([list(rng.permutation(preferred)[:2]) for _ in range(length)])

        english = tokens(16)
        other = english if copied else tokens(7)
        for lang, found in (("en", english), ("xx", other)):
            fields = {"lang": lang, "pair_id": f"p{number}"}
            items.append(lab.Item(tokens=found, fields=fields))
    return items


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("q", ["topk", "counts", "softmax"])
def test_without_language_structure_the_excess_is_near_zero(
    make_store: Callable[..., Store], lab: SimpleNamespace, copied: bool, q: str
) -> None:
    """Contents differ, lengths too: the raw divergence is far from 0, the excess is not."""
    shapes = [lab.Shape(layer=0, num_experts=8, top_k=2)]
    store = make_store(shapes, structureless_items(lab, shapes, copied=copied))
    row = language_divergence(store, "run", q=q).frame.iloc[0]
    assert row["jsd_floor"] > 0.2
    assert row["jsd"] < 1e-9 if copied else row["jsd"] > 0.02
    assert row["num_compared"] == 30
    if copied:
        assert row["jsd_excess"] == pytest.approx(0)
    else:
        assert row["excess_low"] < 0 < row["excess_high"]
        assert abs(row["jsd_excess"]) < 0.02


def test_halves_are_fair_where_tokens_are_independent(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    shapes = [lab.Shape(layer=0, num_experts=8, top_k=2)]
    store = make_store(shapes, structureless_items(lab, shapes, copied=False))
    row = language_divergence(store, "run", floor="halves").frame.iloc[0]
    assert row["tokens_compared"] == 3
    assert row["num_compared"] == 60
    assert row["jsd_floor"] > 0.05
    assert abs(row["jsd_excess"]) < 0.02


def test_phrasings_are_the_floor_where_a_field_tells_them_apart(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Two phrasings share half of their experts, two languages none; a third has one phrasing."""

    def written(lang: str, pair: str, phrasing: str | None, experts: list[int]) -> Any:
        meta = {} if phrasing is None else {"phrasing": phrasing}
        fields = {"lang": lang, "pair_id": pair, "meta": meta}
        return lab.Item(tokens=lab.tokens_of([[expert] for expert in experts]), fields=fields)

    items = [
        written(lang, pair, phrasing, [experts[0], experts[place]] * 3)
        for pair in ("p0", "p1")
        for lang, experts in (("en", (0, 1, 2)), ("de", (3, 4, 5)))
        for place, phrasing in ((1, "a"), (2, "b"))
    ]
    items += [written("en", "p2", "a", [0, 1]), written("de", "p2", None, [3, 4])]
    store = make_store([lab.Shape(layer=0, num_experts=8, top_k=1)], items)
    table = language_divergence(store, "run", phrasing="phrasing", q="counts")
    row = table.frame.iloc[0]
    assert table.context.parameters["floor"] == "phrasings"
    # Samples hold all 6 tokens: (1/2, 1/2, 0) against (1/2, 0, 1/2).
    assert row["jsd_floor"] == pytest.approx(LN2 / 2)
    assert row["jsd_compared"] == pytest.approx(LN2)
    assert row["jsd_excess"] == pytest.approx(LN2 / 2)
    assert row["jsd"] == pytest.approx(LN2)
    assert (row["num_passages"], row["num_compared"], row["tokens_compared"]) == (3, 2, 6)
    with pytest.raises(AnalysisInputError, match="floor phrasings needs phrasing"):
        language_divergence(store, "run", floor="phrasings")
    with pytest.raises(AnalysisInputError, match="two values of 'key' in 'en'"):
        language_divergence(store, "run", phrasing="key")


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


def test_without_routing_rows_all_tokens_are_compared(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Content decides everything: the languages are as far apart as each is from itself."""
    items = [
        item(lab, lang, pair, [[expert]] * 3)
        for pair, expert in (("p0", 0), ("p1", 2))
        for lang in ("en", "de")
    ]
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=1)]
    store = make_store(shapes, items, record_level="usage")
    table = language_divergence(store, "run")
    row = table.frame.iloc[0]
    assert (row["jsd"], row["jsd_compared"], row["jsd_floor"]) == pytest.approx((0, LN2, LN2))
    assert row["jsd_excess"] == 0
    assert "on all tokens" in table.notes[-1]
    assert not table.context.parameters["equal_samples"]
    with pytest.raises(AnalysisInputError, match="runs of level usage do not have"):
        language_divergence(store, "run", floor="halves")


@given(arrays.arrays(np.float64, st.integers(0, 30), elements=st.integers(1, 9)))
def test_neighbors_in_length_pair_each_passage_once(tokens: np.ndarray) -> None:
    pairs = neighbors_in_length(tokens)
    assert pairs.shape == (2, len(tokens) // 2)
    assert len(np.unique(pairs)) == pairs.size
    gaps = np.abs(tokens[pairs[0]] - tokens[pairs[1]])
    best = np.abs(np.diff(np.sort(tokens)))[::2][: len(gaps)]
    assert np.sort(gaps).tolist() == np.sort(best).tolist()


def test_one_passage_has_no_interval(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [item(lab, "en", "p0", [[0], [1]]), item(lab, "de", "p0", [[1], [1]])]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    row = language_divergence(store, "run").frame.iloc[0]
    assert row["num_passages"] == 1
    assert row[["jsd_low", "jsd_high", "excess_low"]].isna().all()
    assert np.isnan(row["jsd_floor"])
    assert row["num_compared"] == 0
    halves = language_divergence(store, "run", floor="halves").frame.iloc[0]
    assert halves["jsd_floor"] >= 0


def test_passages_too_short_to_halve_have_no_floor(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [item(lab, lang, "p0", [[0]]) for lang in ("en", "de")]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    row = language_divergence(store, "run", floor="halves").frame.iloc[0]
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
        ({"floor": "halves", "q": "softmax"}, "floor halves needs the routing of single tokens"),
        ({"bootstrap": 0}, "bootstrap is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"phrasing": "style"}, "no field 'style'"),
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
    lab.edit(store, "UPDATE usage_arrays SET prob_sum = []")
    with pytest.raises(AnalysisInputError, match="does not hold prob_sum for all 4 experts"):
        language_divergence(store, "run", q="softmax")
    assert language_divergence(store, "run", q="counts").frame.at[0, "num_passages"] == 1
