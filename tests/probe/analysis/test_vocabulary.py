"""Vocabulary specialization and the words of experts: by hand, by plain loops, and planted."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.tokens import label_counts
from moescope.probe.analysis.tokens.expert_tokens import expert_tokens
from moescope.probe.analysis.tokens.vocabulary import vocabulary_specialization
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


def set_manifest(lab: SimpleNamespace, store: Store, manifest: Mapping[str, Any]) -> None:
    lab.edit(store, ("UPDATE runs SET manifest = ?", [json.dumps(manifest)]))


def items_of(lab: Any, prompts: list[list[tuple[int, list[int]]]]) -> list[Any]:
    """Prompts as lists of (token id, experts)."""
    return [
        lab.Item(
            tokens=[
                lab.Token(slots={0: [(e, 1 / len(experts)) for e in experts]}, token_id=i)
                for i, experts in prompt
            ]
        )
        for prompt in prompts
    ]


def store_of(make_store: Any, lab: Any, prompts: list[list[tuple[int, list[int]]]]) -> Store:
    """Prompts as lists of (token id, experts); 4 experts at layer 0."""
    width = max(len(experts) for prompt in prompts for _, experts in prompt)
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=width)]
    return make_store(shapes, items_of(lab, prompts))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """Id 7: experts 0 0 1; id 8: 2 2; id 9: 1 once. Token after the first: 7 9; after 8: 8."""
    yield from lab.held_open(
        store_of(make_store, lab, [[(7, [0]), (7, [0]), (9, [1])], [(8, [2]), (8, [2]), (7, [1])]])
    )


def test_the_three_readings_by_hand(small: Store) -> None:
    table = vocabulary_specialization(small, "run", min_count=2)
    row = table.frame.iloc[0]
    assert row["mean_all"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert row["mean_min_count"] == pytest.approx((2 / 3 + 1) / 2)
    assert row["weighted"] == pytest.approx(5 / 6)
    assert [row[name] for name in ("num_ids", "num_singletons", "num_frequent")] == [3, 1, 2]
    assert [row[name] for name in ("num_tokens", "num_prompts", "num_units")] == [6, 2, 2]
    assert table.context.num_tokens == 6
    assert table.notes == ("Labels: the token itself.",)


def test_the_interval_of_the_weighted_reading_by_hand(small: Store) -> None:
    row = vocabulary_specialization(small, "run", min_count=2).frame.iloc[0]
    # Prompt 0 has 3 of 3 tokens at the favorite of their id, prompt 1 has 2 of 3.
    added = np.array([3 - 3 * 5 / 6, 2 - 3 * 5 / 6]) / 6
    reach = stats.t.ppf(0.975, 1) * math.sqrt(2 * (added**2).sum())
    assert row["weighted_low"] == pytest.approx(max(0, 5 / 6 - reach))
    assert row["weighted_high"] == pytest.approx(min(1, 5 / 6 + reach))


def test_the_label_of_the_next_token(small: Store) -> None:
    table = vocabulary_specialization(small, "run", label="next", min_count=1)
    row = table.frame.iloc[0]
    # Next 7: expert 0 (from 7), 2 (from 8). Next 9: 0. Next 8: 2. The last tokens have none.
    assert row["weighted"] == pytest.approx((1 + 1 + 1) / 4)
    assert row["num_tokens"] == 4
    assert table.notes[1] == "Tokens left out because this is not known for them: 2."


def test_ids_that_are_never_frequent_leave_that_reading_missing(small: Store) -> None:
    row = vocabulary_specialization(small, "run", min_count=50).frame.iloc[0]
    names = ["", "_low", "_high", "_chance"]
    assert np.isnan([row[f"mean_min_count{name}"] for name in names]).all()
    assert row["num_frequent"] == 0


@pytest.fixture(scope="module")
def random_ids(
    make_store: Callable[..., Store], lab: SimpleNamespace, random_items: list[Any]
) -> Iterator[Store]:
    """The random items with ids of very different frequency, and a manifest of greedy answers."""
    rng = np.random.default_rng(5)
    items = []
    for item in random_items:
        ids = [int(40 * rng.random() ** 3) for _ in item.tokens]
        tokens = [
            replace(token, token_id=i, text=f"w{i}")
            for token, i in zip(item.tokens, ids, strict=True)
        ]
        items.append(replace(item, tokens=tokens))
    store = make_store(lab.RANDOM_SHAPES, items)
    set_manifest(
        lab,
        store,
        {"arguments": {"max_new_tokens": 8, "sampling": {"do_sample": False, "seed": 0}}},
    )
    yield from lab.held_open(store)


FILTERS = [Filters(), Filters(content_only=False), Filters(tokens="generated", layers=(2,))]


def rows_by_hand(
    store: Store, filters: Filters, label: str, slots: str
) -> Iterator[tuple[int, int, str, list[int]]]:
    """(layer, label, unit, experts) of every counted token with a label, from plain SQL rows."""
    tokens = store.query(
        "SELECT t.*, p.pair_id, p.num_tokens AS length FROM tokens t JOIN prompts p "
        "USING (run_id, prompt_id)"
    ).to_dict("records")
    known = {(t["prompt_id"], t["position"]): t for t in tokens}
    experts = defaultdict(list)
    rows = store.query("SELECT prompt_id, position, layer, rank, expert FROM routing")
    for r in rows.sort_values("rank").to_dict("records"):
        experts[r["prompt_id"], r["position"], r["layer"]].append(r["expert"])
    for (prompt, position, layer), used in experts.items():
        token, following = known[prompt, position], known.get((prompt, position + 1))
        if filters.content_only and (token["is_special"] or token["segment"] == "template"):
            continue
        if filters.scope == "generated" and token["phase"] != "generated":
            continue
        if filters.layers and layer not in filters.layers:
            continue
        chosen = token if label == "input" else following
        if chosen is None or (label == "predicted" and position + 1 < token["length"]):
            continue
        yield layer, chosen["token_id"], token["pair_id"], used[:1] if slots == "top1" else used


@pytest.mark.parametrize(
    ("filters", "label", "slots"),
    [
        (FILTERS[0], "input", "top1"),
        (FILTERS[0], "next", "topk"),
        (FILTERS[0], "predicted", "top1"),
        (FILTERS[1], "input", "topk"),
        (FILTERS[1], "predicted", "topk"),
        (FILTERS[2], "next", "top1"),
        (FILTERS[2], "predicted", "topk"),
    ],
)
def test_readings_agree_with_plain_loops(
    random_ids: Store, filters: Filters, label: Any, slots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_counts, "CELLS_PER_TABLE", 24)
    monkeypatch.setattr(label_counts, "TOKENS_PER_COUNT", 17)
    frame = vocabulary_specialization(
        random_ids, "run", filters=filters, label=label, slots=slots, min_count=5
    ).frame.set_index("layer")
    occurrences: dict[int, Counter[int]] = defaultdict(Counter)
    used: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    for layer, label_id, _, experts in rows_by_hand(random_ids, filters, label, slots):
        occurrences[layer][label_id] += 1
        used[layer].update((label_id, expert) for expert in experts)
    assert sorted(occurrences) == frame.index.tolist()
    for layer, number in occurrences.items():
        most = {i: max(used[layer][i, e] for e in range(8)) for i in number}
        frequent = [i for i in number if number[i] >= 5]
        row = frame.loc[layer]
        assert row["mean_all"] == pytest.approx(np.mean([most[i] / number[i] for i in number]))
        assert row["mean_min_count"] == pytest.approx(
            np.mean([most[i] / number[i] for i in frequent])
        )
        assert row["weighted"] == pytest.approx(sum(most.values()) / sum(number.values()))
        assert row["num_ids"] == len(number)
        assert row["num_singletons"] == sum(n == 1 for n in number.values())
        assert row["num_frequent"] == len(frequent)
        assert row["num_tokens"] == sum(number.values())


def test_intervals_are_those_of_leaving_out_each_unit(random_ids: Store) -> None:
    """Favorites held fixed, the linearized error is close to the delete-one jackknife's."""
    row = vocabulary_specialization(random_ids, "run", filters=Filters(layers=(1,))).frame.iloc[0]
    rows = list(rows_by_hand(random_ids, Filters(layers=(1,)), "input", "top1"))
    used = Counter((i, experts[0]) for _, i, _, experts in rows)
    number = Counter(i for _, i, _, _ in rows)
    favorite = {i: max(range(8), key=lambda e: (used[i, e], -e)) for i in number}
    units = sorted({unit for _, _, unit, _ in rows})

    def readings(left_out: str | None) -> list[float]:
        kept = [r for r in rows if r[2] != left_out]
        count = Counter(r[1] for r in kept)
        hit = Counter(r[1] for r in kept if r[3][0] == favorite[r[1]])
        return [
            float(np.mean([hit[i] / count[i] for i in count if number[i] >= 10])),
            hit.total() / count.total(),
        ]

    without = np.array([readings(unit) for unit in units])
    size = len(units)
    assert size == row["num_units"] == 24
    error = np.sqrt((size - 1) / size * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    for name, expected in zip(("mean_min_count", "weighted"), error, strict=True):
        reach = row[f"{name}_high"] - row[name]
        assert row[name] - row[f"{name}_low"] == pytest.approx(reach)
        assert reach / stats.t.ppf(0.975, size - 1) == pytest.approx(expected, rel=0.1)


def test_unrelated_ids_are_at_chance_and_planted_ones_above(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    rng = np.random.default_rng(2)
    chosen = [[(int(i), [int(i) % 4]) for i in rng.integers(0, 30, 40)] for _ in range(20)]
    unrelated = [[(int(rng.integers(0, 30)), experts) for _, experts in p] for p in chosen]
    store = store_of(make_store, lab, chosen)
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=1)]
    lab.write_run(store.path, shapes, items_of(lab, unrelated), run_id="unrelated")
    row = vocabulary_specialization(store, "run", shuffles=5).frame.iloc[0]
    for name in ("mean_all", "mean_min_count", "weighted"):
        assert row[name] == 1
        assert 0.25 < row[f"{name}_chance"] < 0.6
    row = vocabulary_specialization(store, "unrelated", shuffles=5).frame.iloc[0]
    for name in ("mean_all", "mean_min_count", "weighted"):
        assert row[name] == pytest.approx(row[f"{name}_chance"], abs=0.03)


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_names_of_ids_and_experts_do_not_matter(
    make_store: Callable[..., Store], lab: SimpleNamespace, data: st.DataObject
) -> None:
    tokens = st.tuples(st.integers(0, 5), st.permutations(range(4)).map(lambda e: list(e[:2])))
    prompts = data.draw(st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=2, max_size=4))
    ids, experts = (data.draw(st.permutations(range(n))) for n in (6, 4))
    renamed = [[(ids[i] * 7, [experts[e] for e in used]) for i, used in p] for p in prompts]
    names = ["mean_all", "mean_min_count", "weighted", "num_ids", "num_frequent"]
    store = store_of(make_store, lab, prompts)
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=2)]
    lab.write_run(store.path, shapes, items_of(lab, renamed), run_id="renamed")
    one, other = (
        vocabulary_specialization(store, run_id, slots="topk", min_count=2).frame[names]
        for run_id in ("run", "renamed")
    )
    np.testing.assert_allclose(one.to_numpy(float), other.to_numpy(float))


@pytest.mark.parametrize("label", ["input", "next"])
def test_words_agree_with_plain_loops(
    random_ids: Store, label: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_counts, "CELLS_PER_TABLE", 24)
    filters = Filters(layers=(1, 4))
    table = expert_tokens(random_ids, "run", filters=filters, label=label, min_count=6, top=3)
    frame = table.frame.set_index(["layer", "expert", "rank"])
    rows = list(rows_by_hand(random_ids, filters, label, "topk"))
    for layer in (1, 4):
        own = [row for row in rows if row[0] == layer]
        number = Counter(row[1] for row in own)
        used = Counter((row[1], e) for row in own for e in row[3])
        for expert in range(8):
            uses = sum(used[i, expert] for i in number)
            rate = uses / len(own)
            scores = {}
            for i in number:
                n, size = used[i, expert], number[i]
                if size >= 6 and n / size > rate:
                    rest = size - n
                    scores[i] = n * math.log(n / (size * rate)) + (
                        rest * math.log(rest / (size * (1 - rate))) if rest else 0
                    )
            best = sorted(scores, key=lambda i: (-scores[i], i))[:3]
            found = frame.loc[layer, expert]
            assert found["token_id"].tolist() == best
            assert found["token"].tolist() == [f"w{i}" for i in best]
            np.testing.assert_allclose(found["log_likelihood"], [scores[i] for i in best])
            np.testing.assert_allclose(found["share"], [used[i, expert] / number[i] for i in best])
            np.testing.assert_allclose(found["lift"], found["share"] / rate)
            np.testing.assert_allclose(
                found["expert_share"], [used[i, expert] / uses for i in best]
            )
            for i, row in zip(best, found.to_dict("records"), strict=True):
                low, high, units = interval_by_hand(own, i, expert)
                assert (row["low"], row["high"]) == pytest.approx((low, high))
                assert row["num_units"] == units
                assert (row["num_slots"], row["count"]) == (used[i, expert], number[i])
                assert row["num_tokens"] == len(own)


def interval_by_hand(rows: list[Any], label: int, expert: int) -> tuple[float, float, int]:
    """Of the share of an id's tokens that use an expert, over units."""
    sizes: Counter[str] = Counter()
    uses: Counter[str] = Counter()
    for _, i, unit, experts in rows:
        if i == label:
            sizes[unit] += 1
            uses[unit] += expert in experts
    share, number = uses.total() / sizes.total(), len(sizes)
    squares = sum((uses[unit] - share * sizes[unit]) ** 2 for unit in sizes)
    error = math.sqrt(number / (number - 1) * squares) / sizes.total()
    reach = stats.t.ppf(0.975, number - 1) * error
    return max(0, share - reach), min(1, share + reach), number


def test_a_rare_accident_does_not_lead(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Id 1 goes to expert 0 in 18 of 20 cases, id 2 in 2 of 2: the first is the word."""
    prompt = [(1, [0])] * 9 + [(1, [1])] + [(2, [0])] + [(3, [1]), (4, [2])] * 10
    store = store_of(make_store, lab, [prompt, prompt])
    words = expert_tokens(store, "run", min_count=1).frame
    assert words[words["expert"] == 0]["token_id"].tolist() == [1, 2]
    assert words[words["expert"] == 3].empty
    assert (words["lift"] > 1).all()
    # A min_count leaves the accident out; an expert used by every token has no words.
    words = expert_tokens(store, "run", min_count=3).frame
    assert words[words["expert"] == 0]["token_id"].tolist() == [1]


def test_tokens_that_passed_no_router_do_not_count(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """The second layer routes half of the tokens, with one slot or two."""
    shapes = [lab.Shape(layer=layer, num_experts=4, top_k=2) for layer in (0, 1)]
    slots = [[(1, 0.5), (2, 0.5)], [], [(1, 1.0)], []]
    tokens = [lab.Token(slots={0: [(0, 0.5), (3, 0.5)], 1: used}, token_id=5) for used in slots]
    store = make_store(shapes, [lab.Item(tokens=tokens), lab.Item(tokens=tokens)])
    frame = vocabulary_specialization(store, "run", slots="topk").frame.set_index("layer")
    assert frame["num_tokens"].tolist() == [8, 4]
    assert frame["weighted"].tolist() == [1, 1]
    words = expert_tokens(store, "run", min_count=1).frame
    assert words.empty  # a single id cannot differ from all tokens


def test_runs_that_cannot_answer_are_refused(
    small: Store, random_store: Store, make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    with pytest.raises(AnalysisInputError, match="label is 'other'; it is one of input, next"):
        vocabulary_specialization(small, "run", label="other")  # type: ignore[arg-type]
    with pytest.raises(AnalysisInputError, match="slots is 'all'; it is top1 or topk"):
        expert_tokens(small, "run", slots="all")  # type: ignore[arg-type]
    with pytest.raises(AnalysisInputError, match="min_count is 0; it is 1 or more"):
        vocabulary_specialization(small, "run", min_count=0)
    with pytest.raises(AnalysisInputError, match="no id occurs 10 times in run 'run'"):
        expert_tokens(small, "run")
    with pytest.raises(AnalysisInputError, match="does not say how answers were chosen"):
        vocabulary_specialization(random_store, "run", label="predicted")
    store = store_of(make_store, lab, [[(-1, [0]), (-1, [1])]])
    with pytest.raises(AnalysisInputError, match="not known for any counted token of run 'run'"):
        vocabulary_specialization(store, "run")
    usage_only = make_store(
        [lab.Shape(layer=0, num_experts=2, top_k=1)],
        [lab.Item(tokens=lab.tokens_of([[0]]))],
        record_level="usage",
    )
    with pytest.raises(AnalysisInputError, match="record it with --record topk"):
        vocabulary_specialization(usage_only, "run")


def test_predictions_need_greedy_answers(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    tokens = lab.tokens_of([[0], [1]]) + lab.tokens_of([[2], [3]], phase="generated")
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], [lab.Item(tokens=tokens)])
    greedy = {"max_new_tokens": 2, "sampling": {"do_sample": False}}
    set_manifest(lab, store, {"arguments": greedy})
    table = vocabulary_specialization(store, "run", label="predicted")
    assert table.frame["num_tokens"].tolist() == [2]  # the last prompt token and a generated one
    for changed, reason in (
        ({"sampling": {"do_sample": True}}, "drew its answers at random"),
        ({"max_new_tokens": 0}, "generated no answers"),
    ):
        set_manifest(lab, store, {"arguments": greedy | changed})
        with pytest.raises(AnalysisInputError, match=reason):
            vocabulary_specialization(store, "run", label="predicted")


def test_routers_are_read_in_portions_that_fit(
    random_ids: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = vocabulary_specialization(random_ids, "run", slots="topk").frame
    monkeypatch.setattr(label_counts, "SLOTS_HELD", 1)
    assert vocabulary_specialization(random_ids, "run", slots="topk").frame.equals(whole)


def test_top1_needs_ranks(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    store = store_of(make_store, lab, [[(1, [0, 1]), (2, [3, 1])]])
    lab.edit(store, "UPDATE routing_arrays SET is_ranked = false")
    with pytest.raises(AnalysisInputError, match="which slots top1 needs"):
        vocabulary_specialization(store, "run")
    assert len(vocabulary_specialization(store, "run", slots="topk").frame) == 1
