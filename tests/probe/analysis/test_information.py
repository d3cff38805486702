"""Routing as information: by hand, against scipy, by plain loops, with planted truth."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.intervals import jackknife_groups, jackknife_interval
from moescope.probe.analysis.selection import Router
from moescope.probe.analysis.tokens import information_terms, label_counts
from moescope.probe.analysis.tokens.information import routing_information
from moescope.probe.analysis.tokens.label_counts import RouterSlots, arrange, compact
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


def mutual_information(pairs: list[tuple[Any, Any]]) -> float:
    """H(e) + H(f) - H(e, f) in nats, each by scipy."""
    return sum(
        sign * float(stats.entropy(list(Counter(side).values())))
        for sign, side in (
            (1, [a for a, _ in pairs]), (1, [b for _, b in pairs]), (-1, pairs),
        )
    )  # fmt: skip


def entropy(values: list[Any]) -> float:
    return float(stats.entropy(list(Counter(values).values())))


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """K = 1, E = 3. English always uses 0, German 1 or 2; nobody knows the third prompt's."""
    items = [
        lab.Item(tokens=lab.tokens_of([[0], [0]]), fields={"lang": "en", "domain": "x"}),
        lab.Item(tokens=lab.tokens_of([[1], [2]]), fields={"lang": "de", "domain": "x"}),
        lab.Item(tokens=lab.tokens_of([[2]]), fields={"domain": "x"}),
    ]
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=3, top_k=1)], items))


def test_information_by_hand(small: Store) -> None:
    row = routing_information(small, "run", factor="lang", shuffles=4).frame.iloc[0]
    assert row["information_nats"] == pytest.approx(math.log(2))
    assert row["entropy_nats"] == pytest.approx(1.5 * math.log(2))
    # With two prompts every shuffle is the observed labels or their mirror image.
    assert row["shuffled_nats"] == pytest.approx(math.log(2))
    assert (row["information"], row["share"]) == pytest.approx((0, 0))
    assert row["p"] == 1
    assert [row[name] for name in ("num_values", "num_tokens", "num_prompts")] == [2, 4, 2]


def test_information_per_expert_by_hand(small: Store) -> None:
    table = routing_information(small, "run", factor="lang", per_expert=True)
    frame = table.frame.set_index("expert")
    assert frame.at[0, "information_nats"] == pytest.approx(math.log(2))
    assert frame.at[0, "entropy_nats"] == pytest.approx(math.log(2))
    # Expert 1: used by 1 of 4 tokens, by 0 of 2 in English and 1 of 2 in German.
    whole = float(stats.entropy([1, 3]))
    assert frame.at[1, "entropy_nats"] == pytest.approx(whole)
    assert frame.at[1, "information_nats"] == pytest.approx(whole - math.log(2) / 2)


def test_experts_without_a_choice_are_missing(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [
        lab.Item(tokens=lab.tokens_of([[0, 1], [0, 2]]), fields={"lang": lang})
        for lang in ("en", "de", "de")
    ]
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=2)], items)
    frame = routing_information(store, "run", factor=["lang", "position"], per_expert=True).frame
    for _, part in frame.groupby("factor"):
        assert part["share"].isna().tolist() == [True, False, False, True]
        assert part["information_nats"].isna().tolist() == [True, False, False, True]
        assert part["entropy_nats"].tolist()[::3] == [0, 0]


@pytest.fixture(scope="module")
def random_ids(
    make_store: Callable[..., Store], lab: SimpleNamespace, random_items: list[Any]
) -> Iterator[Store]:
    rng = np.random.default_rng(9)
    items = [
        replace(
            item,
            tokens=[replace(token, token_id=int(25 * rng.random() ** 2)) for token in item.tokens],
        )
        for item in random_items
    ]
    yield from lab.held_open(make_store(lab.RANDOM_SHAPES, items))


def slots_by_hand(store: Store, factor: str, layer: int) -> pd.DataFrame:
    """Every slot of a counted token: prompt, unit, id, value of the factor, expert."""
    tokens = store.query(
        "SELECT t.*, p.lang, p.pair_id, p.label FROM tokens t JOIN prompts p "
        "USING (run_id, prompt_id) ORDER BY t.prompt_id, t.position"
    )
    tokens["token"] = tokens["token_id"]
    tokens["previous_token"] = tokens.groupby("prompt_id")["token_id"].shift(1)
    tokens["bucket"] = [0 if q == 0 else int(math.log2(q)) + 1 for q in tokens["position"]]
    tokens["value"] = tokens["bucket" if factor == "position" else factor]
    kept = tokens[~tokens["is_special"] & (tokens["segment"] != "template")]
    rows = store.query(f"SELECT prompt_id, position, expert FROM routing WHERE layer = {layer}")
    merged = kept.merge(rows, on=["prompt_id", "position"])
    return merged[merged["value"].notna()]


FACTORS = ["token", "previous_token", "position", "phase", "segment", "lang", "label"]


@pytest.mark.parametrize("factor", FACTORS)
def test_information_agrees_with_plain_loops(
    random_ids: Store, factor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_counts, "CELLS_PER_TABLE", 24)
    monkeypatch.setattr(label_counts, "TOKENS_PER_COUNT", 17)
    frame = routing_information(random_ids, "run", factor=factor, shuffles=2).frame
    assert frame["layer"].tolist() == [1, 2, 4]
    for row in frame.to_dict("records"):
        slots = slots_by_hand(random_ids, factor, row["layer"])
        pairs = list(zip(slots["expert"], slots["value"], strict=True))
        assert row["information_nats"] == pytest.approx(mutual_information(pairs))
        assert row["entropy_nats"] == pytest.approx(entropy(slots["expert"].tolist()))
        assert row["share"] == pytest.approx(row["information"] / row["entropy_nats"])
        assert row["num_values"] == slots["value"].nunique()
        assert row["num_tokens"] == len(slots) / 2
        assert row["num_prompts"] == slots["prompt_id"].nunique()
        assert row["num_units"] == slots["pair_id"].nunique()


@pytest.mark.parametrize("factor", ["previous_token", "lang"])
def test_what_is_left_given_the_token(random_ids: Store, factor: str) -> None:
    table = routing_information(
        random_ids, "run", factor=factor, given="token", min_count=30, shuffles=2
    )
    for row in table.frame.to_dict("records"):
        slots = slots_by_hand(random_ids, factor, row["layer"])
        number = slots["token"].value_counts() / 2
        kept = slots[slots["token"].isin(number[number >= 30].index)]
        expected = sum(
            len(part) / len(kept)
            * mutual_information(list(zip(part["expert"], part["value"], strict=True)))
            for _, part in kept.groupby("token")
        )  # fmt: skip
        assert 0 < row["share_counted"] < 1
        assert row["share_counted"] == pytest.approx(len(kept) / len(slots))
        assert row["information_nats"] == pytest.approx(expected)
        assert row["entropy_nats"] == pytest.approx(entropy(kept["expert"].tolist()))
        assert math.isnan(row["p"])
    assert "there is no p" in table.notes[-1]


@pytest.mark.parametrize("factor", ["token", "position", "lang"])
def test_information_per_expert_agrees_with_plain_loops(random_ids: Store, factor: str) -> None:
    table = routing_information(
        random_ids, "run", factor=factor, per_expert=True, shuffles=1, filters=Filters(layers=(2,))
    )
    slots = slots_by_hand(random_ids, factor, 2)
    used = slots.groupby(["prompt_id", "position", "value"])["expert"].agg(set).reset_index()
    for row in table.frame.to_dict("records"):
        selects = [row["expert"] in experts for experts in used["expert"]]
        pairs = list(zip(selects, used["value"], strict=True))
        assert row["information_nats"] == pytest.approx(mutual_information(pairs))
        assert row["entropy_nats"] == pytest.approx(entropy(selects))


def test_the_interval_leaves_out_each_group_of_units(random_ids: Store) -> None:
    """Recomputed by scipy without the units of each group, for a factor of tokens and prompts."""
    for factor in ("token", "lang"):
        row = routing_information(random_ids, "run", factor=factor).frame.iloc[0]
        slots = slots_by_hand(random_ids, factor, 1)
        unit_S = pd.factorize(slots["pair_id"])[0]
        seed = np.random.default_rng([0, zlib.crc32(factor.encode())])
        group_S, number = jackknife_groups(unit_S, seed)

        def share(part: pd.DataFrame, chance: float) -> float:
            pairs = list(zip(part["expert"], part["value"], strict=True))
            return (mutual_information(pairs) - chance) / entropy(part["expert"].tolist())

        chance = row["shuffled_nats"]
        without = np.array([[share(slots[group_S != g], chance)] for g in range(number)])
        low, high = jackknife_interval(np.array([share(slots, chance)]), without)
        assert (row["low"], row["high"]) == pytest.approx((low[0], high[0]))


def test_shuffled_information_is_the_bias(random_ids: Store) -> None:
    """Ids and languages are drawn independently of the routing: what is left is noise."""
    frame = routing_information(random_ids, "run", factor="token,lang", shuffles=30).frame
    assert (frame["information_nats"] > 0).all()
    assert frame["share"].abs().max() < 0.02
    assert (frame["p"] > 0.02).all()
    assert ((frame["low"] < 0) & (frame["high"] > 0)).mean() >= 0.8


def test_the_seed_decides_the_shuffles_of_each_factor_alone(random_ids: Store) -> None:
    alone = routing_information(random_ids, "run", factor="token", seed=3).frame
    several = routing_information(random_ids, "run", factor="lang,token", seed=3).frame
    other = routing_information(random_ids, "run", factor="token", seed=4).frame
    assert alone.equals(several[several["factor"] == "token"].reset_index(drop=True))
    assert not alone["share"].equals(other["share"])


def test_planted_factors_are_found_where_they_are(planted_store: Store) -> None:
    """Ids tell where layer 2 uses expert 3."""
    table = routing_information(planted_store, "run", shuffles=39)
    assert table.context.parameters["factor"] == [
        "token", "previous_token", "position", "lang", "domain",
    ]  # fmt: skip
    assert table.notes == (
        "Left out, because the counted tokens have fewer than two values: label.",
    )
    frame = table.frame.set_index(["factor", "layer"])
    for factor, layers in (("domain", [1]), ("lang", [0, 4])):
        for layer in range(5):
            row = frame.loc[(factor, layer)]
            if layer in layers:
                assert row["low"] > 0.05
                assert row["p"] == 1 / 40
            else:
                assert abs(row["share"]) < 0.01
                assert row["p"] > 1 / 40
    assert frame.loc[("token", 2), "low"] > 0.02
    assert frame.loc[("token", 2), "p"] == 1 / 40
    assert abs(frame.loc[("token", 0), "share"]) < 0.005
    assert (frame.loc["position", "share"].abs() < 0.005).all()


def test_planted_experts_carry_the_information(planted_store: Store) -> None:
    # Each prompt is a unit: of 18 passages, shuffled domains alone explain a tenth.
    frame = routing_information(
        planted_store, "run", factor="domain", per_expert=True, unit="key",
        filters=Filters(layers=(1,)),
    ).frame  # fmt: skip
    assert sorted(frame.nlargest(3, "share")["expert"]) == [20, 21, 22]
    assert frame.nlargest(3, "share")["share"].min() > 0.95
    token = routing_information(
        planted_store, "run", factor="token", per_expert=True, filters=Filters(layers=(2,))
    ).frame
    assert token["share"].idxmax() == 3
    assert token["share"].max() > 0.95


def test_a_language_adds_nothing_to_ids_of_its_own(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Every language has its own ids, and routing goes by the id: given it, nothing is left."""
    rng = np.random.default_rng(1)
    items = []
    for prompt in range(40):
        own = (rng.integers(0, 6, 20) + 6 * (prompt % 2)).tolist()
        tokens = [lab.Token(slots={0: [(i % 4, 1.0)]}, token_id=i) for i in own]
        items.append(lab.Item(tokens=tokens, fields={"lang": "ab"[prompt % 2]}))
    store = make_store([lab.Shape(layer=0, num_experts=4, top_k=1)], items)
    alone = routing_information(store, "run", factor="lang").frame.iloc[0]
    given_token = routing_information(store, "run", factor="lang", given="token").frame.iloc[0]
    assert alone["low"] > 0.01
    assert given_token["information_nats"] == pytest.approx(0, abs=1e-9)
    assert given_token["information"] == pytest.approx(0, abs=1e-9)


def test_translations_of_an_item_are_shuffled_together(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Six items, each with an expert of its own, in many copies: no sign of their domains."""
    items = [
        lab.Item(
            tokens=lab.tokens_of([[unit]] * 5),
            fields={"domain": "ab"[unit % 2], "pair_id": f"p{unit}", "key": str(copy)},
        )
        for unit in range(6)
        for copy in range(10)
    ]
    store = make_store([lab.Shape(layer=0, num_experts=6, top_k=1)], items)
    by_unit = routing_information(store, "run", factor="domain", shuffles=20).frame.iloc[0]
    by_prompt = routing_information(
        store, "run", factor="domain", unit="key", shuffles=20
    ).frame.iloc[0]
    assert by_unit["p"] == 1
    assert by_unit["share"] == pytest.approx(0)
    assert by_prompt["p"] == pytest.approx(1 / 21)
    assert (by_unit["num_units"], by_prompt["num_units"]) == (6, 10)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sums_without_groups_are_those_of_the_other_tokens(data: st.DataObject) -> None:
    """Both ways of counting agree with counting again, whatever the labels and missing slots."""
    size = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    experts = np.argsort(rng.random((size, 5)), axis=1)[:, :3].astype(np.uint16)
    short = rng.random(size) < data.draw(st.sampled_from([0.0, 0.3]))
    experts[short, 2] = 5
    router = Router(layer=0, kind="mlp", moe_layer=0, num_experts=5, top_k=3)
    slots = RouterSlots(router=router, experts=experts, passed=None, is_even=not short.any())
    label = compact(rng.integers(0, data.draw(st.integers(1, 40)), size))[0]
    group = rng.integers(0, 4, size)
    labels = information_terms.group_labels(label, group, 4)
    for per_expert in (False, True):
        whole = information_terms.grouped_terms(slots, labels, per_expert=per_expert)
        for left_out in range(4):
            rest = arrange(np.where(group == left_out, -1, label), int(label.max()) + 1)
            expected = information_terms.summed_terms(slots, rest, per_expert=per_expert)
            np.testing.assert_allclose(whole.without[left_out], expected, atol=1e-9)


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_names_do_not_matter_and_bounds_hold(
    make_store: Callable[..., Store], lab: SimpleNamespace, data: st.DataObject
) -> None:
    """Renaming experts and ids changes nothing; 0 <= I <= min(H(e), ln values)."""
    token = st.tuples(st.integers(0, 3), st.permutations(range(4)).map(lambda e: list(e[:2])))
    prompts = data.draw(st.lists(st.lists(token, min_size=2, max_size=5), min_size=2, max_size=4))
    experts, ids = data.draw(st.permutations(range(4))), data.draw(st.permutations(range(4)))
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=2)]

    def items(ids: Sequence[int], experts: Sequence[int]) -> list[Any]:
        return [
            lab.Item(
                tokens=[
                    lab.Token(slots={0: [(experts[e], 0.5) for e in used]}, token_id=ids[i])
                    for i, used in prompt
                ]
            )
            for prompt in prompts
        ]

    store = make_store(shapes, items(range(4), range(4)))
    lab.write_run(store.path, shapes, items(ids, experts), run_id="renamed")
    frames = []
    for run_id in ("run", "renamed"):
        try:
            frame = routing_information(store, run_id, factor="token").frame
        except AnalysisInputError:
            assert len({i for prompt in prompts for i, _ in prompt}) == 1
            return
        for row in frame[frame["entropy_nats"] > 0].to_dict("records"):
            most = min(row["entropy_nats"], math.log(row["num_values"]))
            assert -1e-9 <= row["information_nats"] <= most + 1e-9
        frames.append(frame)
    names = ["information_nats", "entropy_nats", "num_values"]
    np.testing.assert_allclose(frames[0][names], frames[1][names], atol=1e-9)


def test_large_counts_are_computed_not_looked_up() -> None:
    counts = np.array([0, 1, 65_535, 65_536, 10**7])
    found = information_terms.x_log_x(counts, 10**7)
    expected = [0, 0, *(n * math.log(n) for n in (65_535, 65_536, 10**7))]
    np.testing.assert_allclose(found, expected)


def test_tokens_that_did_not_pass_a_router_do_not_count(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Position tells layer 1 nothing but for the two tokens that pass it."""
    shapes = [lab.Shape(layer=layer, num_experts=4, top_k=2) for layer in (0, 1)]
    slots = [[(1, 0.5), (2, 0.5)], [], [(3, 1.0)], []]
    tokens = [lab.Token(slots={0: [(0, 0.5), (3, 0.5)], 1: used}) for used in slots]
    store = make_store(shapes, [lab.Item(tokens=tokens), lab.Item(tokens=tokens)])
    frame = routing_information(store, "run", factor="position").frame.set_index("layer")
    assert frame["num_tokens"].tolist() == [8, 4]
    assert frame["num_values"].tolist() == [3, 2]
    whole = float(stats.entropy([2, 2, 2]))
    assert frame.at[1, "entropy_nats"] == pytest.approx(whole)
    assert frame.at[1, "information_nats"] == pytest.approx(float(stats.entropy([4, 2])))


def test_counts_of_each_kind_of_router_are_apart(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    shapes = [
        lab.Shape(layer=0, num_experts=2, top_k=1, kind=kind) for kind in ("mlp", "attention")
    ]
    items = [
        lab.Item(tokens=lab.tokens_of([[e]] * 3), fields={"lang": "ab"[e]}) for e in (0, 1, 0, 1)
    ]
    frame = routing_information(make_store(shapes, items), "run", factor="lang").frame
    assert frame["kind"].tolist() == ["attention", "mlp"]
    assert frame["information_nats"].tolist() == pytest.approx([math.log(2)] * 2)


def test_bad_parameters_are_refused(small: Store, random_store: Store) -> None:
    def refused(match: str, store: Store = small, **changes: Any) -> None:
        with pytest.raises(AnalysisInputError, match=match):
            routing_information(store, "run", **changes)

    refused("no factor 'modality'; tokens have token, previous_token", factor="modality")
    refused("fewer than two values of 'domain'", factor="lang,domain")
    refused("factor names nothing", factor=" , ")
    refused("given is 'lang'; it is none or token", given="lang")
    refused("shuffles is 0; it is 1 or more", shuffles=0)
    refused("min_count is 0", min_count=0)
    refused("factor token tells nothing once the token is given", factor="token", given="token")
    refused("values of 'lang' among ids seen 10 times", factor="lang", given="token")
    refused("no field 'units'", unit="units")
    refused("no routed token", random_store, filters=Filters(tokens="span", segments=("thinking",)))


def test_meta_fields_are_factors(random_store: Store) -> None:
    frame = routing_information(random_store, "run", factor="topic").frame
    assert frame["num_values"].tolist() == [3, 3, 3]


def test_interval_needs_two_units(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    item = lab.Item(tokens=lab.tokens_of([[0], [1], [0], [1]]))
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], [item])
    row = routing_information(store, "run", factor="position").frame.iloc[0]
    assert row["num_units"] == 1
    assert np.isnan([row["low"], row["high"]]).all()
    assert not np.isnan(row["share"])


def test_runs_without_token_ids_answer_what_they_can(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    tokens = lab.tokens_of([[0], [1]], token_id=-1)
    items = [lab.Item(tokens=tokens, fields={"lang": lang}) for lang in "ab"]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    table = routing_information(store, "run")
    assert table.context.parameters["factor"] == ["position", "lang"]
    assert table.notes[-1].endswith("two values: token, previous_token, domain, label.")


def test_only_prompt_fields_need_no_routing_of_tokens(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = [lab.Item(tokens=lab.tokens_of([[e]]), fields={"lang": "ab"[e]}) for e in (0, 1)]
    shapes = [lab.Shape(layer=0, num_experts=2, top_k=1)]
    usage = make_store(shapes, items, record_level="usage")
    frame = routing_information(usage, "run", factor="lang").frame
    assert frame.at[0, "information_nats"] == pytest.approx(math.log(2))
    with pytest.raises(AnalysisInputError, match="record it with --record topk"):
        routing_information(usage, "run", factor="position")
