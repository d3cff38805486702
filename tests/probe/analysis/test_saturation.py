"""Saturation: OLMoE's overlap by hand, against plain loops, its chance levels, what is missing."""

from __future__ import annotations

import math
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
from moescope.probe.analysis.two_runs.entries import TWO_RUN_ANALYSES
from moescope.probe.analysis.two_runs.saturation import router_saturation
from moescope.probe.demo.planted_routing import plant_routing
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

MakeStore = Callable[..., Store]
SHARES = ["saturation", "top1_match", "identical", "jaccard", "jsd", "jsd_token"]


def rerouted(items: list[Any], share: float, seed: int) -> list[Any]:
    """The same items with other experts and weights for some of their tokens."""
    rng = np.random.default_rng(seed)
    changed = []
    for item in items:
        tokens = []
        for token in item.tokens:
            slots = dict(token.slots)
            for layer, own in token.slots.items():
                if rng.random() < share:
                    experts = rng.choice(8, size=len(own), replace=False).tolist()
                    weights = rng.random(len(own)) / 2 + 0.1
                    slots[layer] = list(zip(experts, weights.tolist(), strict=True))
            tokens.append(replace(token, slots=slots, scores={}))
        changed.append(replace(item, tokens=tokens))
    return changed


@pytest.fixture(scope="module")
def two(make_store: MakeStore, lab: SimpleNamespace, random_items: list[Any]) -> Iterator[Store]:
    shapes = lab.RANDOM_SHAPES
    items = random_items[:36]
    store = make_store(shapes, items)
    lab.write_run(store.path, shapes, rerouted(items, 0.6, 1), run_id="other")
    yield from lab.held_open(store)


def test_numbers_by_hand(make_store: MakeStore, lab: SimpleNamespace) -> None:
    """E = 4, K = 2. Slots as expert: weight, the first the larger."""
    own = [{0: 0.6, 1: 0.2}, {0: 0.3, 2: 0.1}, {2: 0.5, 3: 0.5}, {1: 0.75, 0: 0.25}]
    other = [{0: 0.6, 1: 0.2}, {2: 0.3, 0: 0.1}, {0: 0.5, 1: 0.5}, {1: 0.5, 3: 0.5}]
    shapes = [lab.Shape(layer=3, num_experts=4, top_k=2)]

    def items(tokens: list[dict[int, float]]) -> list[Any]:
        made = [lab.Token(slots={3: list(slots.items())}) for slots in tokens]
        return [lab.Item(tokens=part) for part in (made[:2], made[2:3], made[3:])]

    store = make_store(shapes, items(own))
    lab.write_run(store.path, shapes, items(other), run_id="final")
    table = router_saturation(store, "run", against="final")
    (row,) = table.frame.to_dict("records")
    assert row["saturation"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert row["top1_match"] == pytest.approx(2 / 4)
    assert row["identical"] == pytest.approx(2 / 4)
    assert row["jaccard"] == pytest.approx((1 + 1 + 0 + 1 / 3) / 4)
    assert row["chance"] == 0.5
    # Tokens of experts 0 to 3: 3 2 2 1 in the run, 3 3 1 1 in the reference; N = 4, K = 2.
    assert row["chance_by_load"] == pytest.approx((9 + 6 + 2 + 1) / 16 / 2)
    # First ranks (ties to the lower id): 2 1 1 0 and 2 1 1 0.
    assert row["top1_chance"] == pytest.approx((4 + 1 + 1) / 16)
    load, other_load = np.array([3, 2, 2, 1]) / 8, np.array([3, 3, 1, 1]) / 8
    assert row["jsd"] == pytest.approx(jsd(load, other_load))
    by_token = [
        0,
        jsd([0.75, 0, 0.25], [0.25, 0, 0.75]),
        math.log(2),
        jsd([0.25, 0.75, 0, 0], [0, 0.5, 0, 0.5]),
    ]
    assert row["jsd_token"] == pytest.approx(np.mean(by_token), abs=1e-6)
    # Ratio of sums over three prompts: n = 2, 0, 0.5 of d = 2, 1, 1 tokens, r = 5/8. Residuals 3/4,
    # -5/8, -1/8, so the standard error is sqrt(3/2 * 31/32) / 4; t(2) = 4.3 reaches the bounds.
    assert (row["low"], row["high"]) == (0, 1)
    assert (row["num_tokens"], row["num_prompts"], row["num_units"]) == (4, 3, 3)
    assert (row["layer"], row["kind"], row["top_k"]) == (3, "mlp", 2)
    assert table.summary == {"saturation": row["saturation"]}
    assert table.context.parameters == {"against": "final", "unit": "pair_id"}
    assert table.notes == ("Prompts matched with run 'final': 3.",)


def jsd(p: Any, q: Any) -> float:
    """In nats, term by term."""
    total = 0.0
    for a, b in zip(np.asarray(p, dtype=float), np.asarray(q, dtype=float), strict=True):
        total += sum(x * math.log(2 * x / (a + b)) / 2 for x in (a, b) if x)
    return total


def rows_of(store: Store, run_id: str) -> dict[Any, dict[int, tuple[int, float]]]:
    """(prompt, position, layer) -> expert -> (rank, weight) of the content tokens."""
    rows = store.query(
        "SELECT prompt_id, position, layer, expert, rank, weight FROM routing "
        "JOIN tokens t USING (run_id, prompt_id, position) WHERE run_id = ? "
        "AND NOT is_special AND segment != 'template'",
        [run_id],
    )
    found: dict[Any, dict[int, tuple[int, float]]] = defaultdict(dict)
    for row in rows.itertuples(index=False):
        found[row.prompt_id, row.position, row.layer][row.expert] = (row.rank, row.weight)
    return found


def test_agreement_with_plain_loops(two: Store) -> None:
    frame = router_saturation(two, "run", against="other").frame.set_index("layer")
    own, other = rows_of(two, "run"), rows_of(two, "other")
    for layer in (1, 2, 4):
        values: dict[str, list[float]] = defaultdict(list)
        units: list[int] = []
        loads = np.zeros((2, 8))
        for key in (key for key in own if key[2] == layer):
            a, b = own[key], other[key]
            shared = len(a.keys() & b.keys())
            units.append(key[0] // 3)
            values["saturation"].append(shared / len(b))
            values["jaccard"].append(shared / len(a.keys() | b.keys()))
            values["identical"].append(a.keys() == b.keys())
            values["top1_match"].append(min(a, key=lambda e: a[e]) == min(b, key=lambda e: b[e]))
            weights = np.zeros((2, 8))
            for side, slots in enumerate((a, b)):
                for expert, (_, weight) in slots.items():
                    weights[side, expert] = weight
                    loads[side, expert] += 1
            p, q = weights / weights.sum(axis=1, keepdims=True)
            values["jsd_token"].append(jsd(p, q))
        row = frame.loc[layer]
        for name, numbers in values.items():
            assert row[name] == pytest.approx(np.mean(numbers), abs=1e-6), name
        p, q = loads / loads.sum(axis=1, keepdims=True)
        assert row["jsd"] == pytest.approx(jsd(p, q), abs=1e-12)
        shares = loads / len(values["saturation"])
        assert row["chance_by_load"] == pytest.approx(shares[0] @ shares[1] / 2)
        assert row["num_tokens"] == len(values["saturation"])
        assert (row["num_prompts"], row["num_units"]) == (36, 12)
        for name, low, high in (
            ("saturation", "low", "high"),
            ("top1_match", "top1_low", "top1_high"),
        ):
            mean = np.mean(values[name])
            sums = [
                sum(x - mean for x, unit in zip(values[name], units, strict=True) if unit == u)
                for u in range(12)
            ]
            reach = 2.2009852 * np.sqrt(12 / 11 * np.square(sums).sum()) / len(units)
            assert (row[low], row[high]) == pytest.approx((mean - reach, mean + reach))


def test_independent_runs_lie_at_chance(
    make_store: MakeStore, lab: SimpleNamespace, random_items: list[Any]
) -> None:
    shapes = lab.RANDOM_SHAPES
    store = make_store(shapes, random_items)
    lab.write_run(store.path, shapes, rerouted(random_items, 1.0, 5), run_id="other")
    frame = router_saturation(store, "run", against="other").frame
    for name, chance in (("saturation", "chance_by_load"), ("top1_match", "top1_chance")):
        assert np.abs(frame[name] - frame[chance]).max() < 0.05
    assert set(frame["chance"]) == {0.25}


def test_intervals_are_over_units(two: Store) -> None:
    by_pair, by_prompt = (
        router_saturation(two, "run", against="other", unit=unit).frame
        for unit in ("pair_id", "key")
    )
    assert by_pair["saturation"].equals(by_prompt["saturation"])
    assert set(by_pair["num_units"]) == {12}
    assert set(by_prompt["num_units"]) == {36}
    assert not by_pair["low"].equals(by_prompt["low"])
    one = router_saturation(
        two, "run", against="other", filters=Filters(fields={"pair_id": ("p3",)})
    ).frame
    assert set(one["num_units"]) == {1}
    assert one[["low", "high", "top1_low", "top1_high"]].isna().all(axis=None)


@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_symmetry_and_names_of_experts(
    data: st.DataObject, make_store: MakeStore, lab: SimpleNamespace
) -> None:
    """Neither the order of two runs with the same K nor the numbering of experts matters."""
    order = st.permutations(range(5))
    token = st.tuples(order, order, order)  # a router each
    own = data.draw(st.lists(token, min_size=3, max_size=6))
    other = [data.draw(token) for _ in own]
    renamed = data.draw(order)

    def items(tokens: list[Any], names: list[int]) -> list[Any]:
        made = [
            lab.Token(
                slots={
                    layer: [(names[expert], 2.0**-rank) for rank, expert in enumerate(experts[:3])]
                    for layer, experts in enumerate(token)
                }
            )
            for token in tokens
        ]
        return [lab.Item(tokens=made[:2]), lab.Item(tokens=made[2:])]

    shapes = [lab.Shape(layer=layer, num_experts=5, top_k=3) for layer in range(3)]
    store = make_store(shapes, items(own, list(range(5))))
    runs = {"other": (other, list(range(5))), "a": (own, renamed), "b": (other, renamed)}
    for name, (tokens, names) in runs.items():
        lab.write_run(store.path, shapes, items(tokens, names), run_id=name)
    frame = router_saturation(store, "run", against="other").frame
    found = router_saturation(store, "b", against="a").frame
    ends = ["low", "high", "top1_low", "top1_high"]
    columns = [*SHARES, *ends, "chance", "chance_by_load", "top1_chance"]
    np.testing.assert_allclose(found[columns], frame[columns], atol=1e-7)
    assert ((frame[SHARES] >= 0) & (frame[SHARES] <= 1)).all(axis=None)
    assert (frame["identical"] <= frame["jaccard"]).all()
    assert (frame["jaccard"] <= frame["saturation"]).all()


def test_another_number_of_experts(make_store: MakeStore, lab: SimpleNamespace) -> None:
    """The run selects 1 or 3 of 4 experts, the reference 2: the overlap is over 2."""
    shapes = [lab.Shape(layer=0, num_experts=4, top_k=3)]
    store = make_store(shapes, [lab.Item(tokens=lab.tokens_of([[0], [0, 1, 2], [3]]))])
    items = [lab.Item(tokens=lab.tokens_of([[0, 1], [0, 1], [0, 1]]))]
    lab.write_run(store.path, shapes, items, run_id="other")
    table = router_saturation(store, "run", against="other")
    (row,) = table.frame.to_dict("records")
    assert row["saturation"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert row["jaccard"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert row["identical"] == 0
    assert row["chance"] == pytest.approx(5 / 3 / 4)
    assert (row["top_k"], row["top_k_against"]) == (pytest.approx(5 / 3), 2)
    assert any("over the number of the reference" in note for note in table.notes)


def test_what_a_run_lacks_is_missing(two: Store, make_store: MakeStore, lab: Any) -> None:
    shapes = [lab.Shape(layer=0, num_experts=3, top_k=2)]
    items = [lab.Item(tokens=lab.tokens_of([[0, 1], [1, 2]]))]
    store = make_store(shapes, items)
    lab.write_run(store.path, shapes, items, run_id="other")
    lab.edit(
        store,
        "UPDATE routing_arrays SET weights = NULL, bf16_weights = NULL, is_ranked = false "
        "WHERE run_id = 'other'",
    )
    table = router_saturation(store, "run", against="other")
    missing = ["jsd_token", "top1_match", "top1_low", "top1_high", "top1_chance"]
    assert table.frame[missing].isna().all(axis=None)
    assert table.frame["saturation"].tolist() == [1]
    assert [note for note in table.notes if "no ranks" in note or "no routing weights" in note]
    drift = expert_drift(store, "run", against="other")
    assert drift.frame["weight_shift"].isna().all()
    assert set(drift.frame["shift"]) == {0}


def test_weights_of_nothing_are_no_distribution(make_store: MakeStore, lab: Any) -> None:
    """A token whose experts were all dropped has no divergence, and a dropped slot has 0."""
    shapes = [lab.Shape(layer=0, num_experts=3, top_k=2)]
    own = [{0: 0.0, 1: 0.0}, {0: 1.0, 1: 0.0}]
    other = [{0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}]
    made = [
        [lab.Item(tokens=[lab.Token(slots={0: list(slots.items())}) for slots in tokens])]
        for tokens in (own, other)
    ]
    store = make_store(shapes, made[0])
    lab.write_run(store.path, shapes, made[1], run_id="other")
    (row,) = router_saturation(store, "run", against="other").frame.to_dict("records")
    assert row["jsd_token"] == pytest.approx(jsd([1, 0], [0.5, 0.5]), abs=1e-6)
    assert row["saturation"] == 1


def test_planted_change_is_found_in_its_layer(make_store: MakeStore, lab: Any) -> None:
    """Layer 1 exchanges two experts, which every token of two domains uses one of."""
    truth = plant_routing(prompts_per_cell=1, tokens_per_prompt=8)
    first, second = list(truth.specialists[1])[:2]
    names = np.arange(truth.num_experts)
    names[[first, second]] = second, first
    changed = truth.expert_ids.copy()
    changed[:, 1] = names[changed[:, 1]]
    store = make_store(lab.PLANTED_SHAPES, lab.planted_items(truth), run_id="base")
    items = lab.planted_items(replace(truth, expert_ids=changed))
    lab.write_run(store.path, lab.PLANTED_SHAPES, items)
    frame = router_saturation(store, "run", against="base").frame.set_index("layer")
    assert frame["saturation"].drop(1).eq(1).all()
    assert frame["jsd_token"].drop(1).eq(0).all()
    # Two domains of three lose one expert of four.
    assert frame.at[1, "saturation"] == pytest.approx(1 - 2 / 3 / 4)
    assert frame.at[1, "identical"] == pytest.approx(1 / 3)


def test_a_model_recorded_twice_has_not_moved(tiny_bundle: Any, tmp_path: Any) -> None:
    """The same model and prompts: everything is kept, nothing has shifted."""
    from moescope.probe import read_prompts, trace_prompts
    from moescope.probe.trace import TraceOptions

    prompts = read_prompts(["neutral"])[:3]
    path = tmp_path / "store.duckdb"
    for run_id in ("one", "two"):
        trace_prompts(tiny_bundle, prompts, path, run_id, TraceOptions(max_new_tokens=2))
    store = Store(path)
    saturation, drift = (
        analysis.function(store, "one", against="two").frame for analysis in TWO_RUN_ANALYSES
    )
    kept = saturation[["saturation", "low", "high", "top1_match", "identical", "jaccard"]]
    assert kept.eq(1).all(axis=None)
    assert saturation[["jsd", "jsd_token"]].eq(0).all(axis=None)
    assert drift[["shift", "low", "high", "weight_shift"]].eq(0).all(axis=None)
    assert drift["kept"].dropna().eq(1).all()
    assert not drift["moved"].any()
    assert drift["p"].eq(1).all()


def test_the_command_line_offers_both() -> None:
    saturation, drift = TWO_RUN_ANALYSES
    assert (saturation.name, drift.name) == ("saturation", "drift")
    assert saturation.parse({"against": "final"}) == {"against": "final", "unit": "pair_id"}
    assert drift.parse({"against": "base", "level": "0.01"})["level"] == 0.01
    with pytest.raises(AnalysisInputError, match="'saturation' needs against"):
        saturation.parse({})
