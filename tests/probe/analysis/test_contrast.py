"""The contrast: effects by hand, planted experts found, nothing found in noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.probe.analysis import Filters, expert_contrast
from moescope.probe.analysis.statistics import benjamini_hochberg
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store

REFUSED, CORRECT = {"outcome": ["refused"]}, {"outcome": ["correct"]}


def outcome_items(lab: SimpleNamespace, **lists: list[list[list[int]]]) -> list[Any]:
    """One item per list of tokens; the keyword is its outcome."""
    return [
        lab.Item(tokens=lab.tokens_of(tokens), fields={"outcome": outcome})
        for outcome, prompts in lists.items()
        for tokens in prompts
    ]


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """K = 1, E = 3. Refused: 3 tokens on 0 and 1 on 1, of 1 + 3; correct: 5 on 1 and 1 on 2."""
    items = outcome_items(
        lab, refused=[[[0]], [[0], [0], [1]]], correct=[[[1], [1]], [[1], [1], [1], [2]]]
    )
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=3, top_k=1)], items))


def test_pooled_effects_by_hand(small: Store) -> None:
    table = expert_contrast(small, "run", a=REFUSED, b=CORRECT, split=False)
    frame = table.frame.set_index("expert").sort_index()
    assert frame["risk_difference"].tolist() == pytest.approx([3 / 4, 1 / 4 - 5 / 6, -1 / 6])
    assert frame["effect"].tolist() == frame["risk_difference"].tolist()
    assert frame[["a1", "d1", "a2", "d2"]].to_numpy().tolist() == [
        [3, 1, 0, 6], [1, 3, 5, 1], [0, 4, 1, 5]
    ]  # fmt: skip
    assert frame["rate_a"].tolist() == [0.75, 0.25, 0]
    assert table.frame["expert"].tolist() == [0, 1, 2]
    assert set(frame["num_prompts_a"]) == set(frame["num_prompts_b"]) == {2}
    assert (frame["num_tokens_a"].iloc[0], frame["num_tokens_b"].iloc[0]) == (4, 6)
    assert frame["q"].isna().all()
    assert "optimistic" in table.notes[0]
    assert set(frame["chance"]) == {1 / 3}


def test_unit_effects_by_hand(small: Store) -> None:
    table = expert_contrast(small, "run", a=REFUSED, b=CORRECT, split=False, average="unit")
    frame = table.frame.set_index("expert").sort_index()
    expected = [(1 + 2 / 3) / 2, (0 + 1 / 3) / 2 - (1 + 3 / 4) / 2, -1 / 8]
    assert frame["risk_difference"].tolist() == pytest.approx(expected)
    assert frame["a1"].tolist() == [3, 1, 0]


def planted_items(lab: SimpleNamespace, seed: int, units: int = 24) -> list[Any]:
    """Refused prompts use expert 5 of layer 1 in 70 % of tokens, others in 20 %."""
    rng = np.random.default_rng(seed)
    items = []
    for unit in range(units):
        refused = unit % 2 == 0
        for lang in ("de", "en", "zh"):
            tokens = []
            for _ in range(int(rng.integers(6, 15))):
                slots = {}
                for layer in (0, 1):
                    others = rng.permutation([0, 1, 2, 3, 4, 6, 7])
                    planted = layer == 1 and rng.random() < (0.7 if refused else 0.2)
                    chosen = [5, others[0]] if planted else others[:2]
                    slots[layer] = [(int(expert), 0.5) for expert in chosen]
                tokens.append(lab.Token(slots=slots))
            fields = {"outcome": "refused" if refused else "correct", "lang": lang,
                      "pair_id": f"p{unit}"}  # fmt: skip
            items.append(lab.Item(tokens=tokens, fields=fields))
    return items


@pytest.fixture(scope="module")
def planted(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    shapes = [lab.Shape(layer=layer, num_experts=8, top_k=2) for layer in (0, 1)]
    yield from lab.held_open(make_store(shapes, planted_items(lab, seed=3)))


@pytest.mark.parametrize("average", ["pooled", "unit"])
def test_a_planted_expert_is_found_and_confirmed(planted: Store, average: str) -> None:
    table = expert_contrast(planted, "run", a=REFUSED, b=CORRECT, average=average, candidates=5)
    first = table.frame.iloc[0]
    assert (first["layer"], first["expert"]) == (1, 5)
    assert first["confirmed"]
    assert first["low"] < 0.5 < first["high"]
    assert first["q"] < 0.01
    # The planted expert takes a slot from the others of its layer; layer 0 has no part in it.
    assert set(table.frame.loc[table.frame["confirmed"], "layer"]) == {1}
    assert table.frame["candidate"].sum() == table.summary["candidates"] == 5
    assert table.summary["units_a"] == table.summary["units_b"] == 6
    assert table.context.parameters["permutations"] == 2_000
    assert table.context.parameters["a"] == {"outcome": ["refused"]}
    tested = table.frame[table.frame["candidate"]]
    assert benjamini_hochberg(tested["p"].to_numpy()) == pytest.approx(tested["q"].to_numpy())
    untested = table.frame[~table.frame["candidate"]]
    assert untested[["effect", "low", "high", "p", "q"]].isna().all(axis=None)
    assert not untested["confirmed"].any()


def test_without_a_split_max_t_finds_it(planted: Store) -> None:
    table = expert_contrast(planted, "run", a=REFUSED, b=CORRECT, split=False)
    first = table.frame.iloc[0]
    assert (first["layer"], first["expert"], first["confirmed"]) == (1, 5, True)
    assert set(table.frame.loc[table.frame["confirmed"], "layer"]) == {1}
    assert table.summary["units_a"] == table.summary["units_b"] == 12


def test_halves_are_units_and_even_in_both_groups(planted: Store) -> None:
    """24 units of three translations: each half ranks on 6 + 6 units, never on a part of one."""
    table = expert_contrast(planted, "run", a=REFUSED, b=CORRECT, candidates=5)
    per_unit = expert_contrast(
        planted, "run", a=REFUSED, b=CORRECT, candidates=5, unit="key", average="unit"
    )
    assert table.summary["units_a"] == 6
    assert per_unit.summary["units_a"] == 18


def test_the_same_seed_gives_the_same_table(planted: Store) -> None:
    one, same, other = (
        expert_contrast(planted, "run", a=REFUSED, b=CORRECT, candidates=5, seed=seed).frame
        for seed in (4, 4, 5)
    )
    assert one.equals(same)
    assert not one["risk_difference"].equals(other["risk_difference"])


def test_matched_units_swap_within(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    """Units that differ wildly but all by the same step are told apart only when matched."""
    rng = np.random.default_rng(0)
    items = []
    for unit in range(12):
        base = rng.integers(2, 14)
        for outcome, used in (("refused", base + 3), ("correct", base)):
            tokens = lab.tokens_of([[0]] * int(used) + [[1]] * int(20 - used))
            fields = {"outcome": outcome, "pair_id": f"p{unit}"}
            items.append(lab.Item(tokens=tokens, fields=fields))
    store = make_store([lab.Shape(layer=0, num_experts=3, top_k=1)], items)
    matched = expert_contrast(store, "run", a=REFUSED, b=CORRECT, split=False)
    apart = expert_contrast(store, "run", a=REFUSED, b=CORRECT, split=False, unit="key")
    assert matched.summary["matched_units"] == 12
    assert apart.summary["matched_units"] == 0
    first, second = (table.frame.set_index("expert").loc[0] for table in (matched, apart))
    assert first["effect"] == second["effect"] == pytest.approx(0.15)
    assert first["confirmed"]
    assert first["low"] == pytest.approx(0.15)
    assert second["p"] > 0.05
    assert second["low"] < 0.05


def test_scopes_and_filters_hold_for_contrasts(random_store: Store) -> None:
    a, b = {"label": ["a"]}, {"label": ["b"]}
    filters = Filters(tokens="last_prompt", layers=(2,), fields={"lang": ("en", "de")})
    table = expert_contrast(random_store, "run", a=a, b=b, filters=filters, candidates=3)
    assert set(table.frame["layer"]) == {2}
    assert table.context.num_tokens == 48
    assert (table.frame["a1"] + table.frame["d1"] == 12).all()


def test_few_units_are_refused_or_noted(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = outcome_items(lab, refused=[[[0]]] * 5, correct=[[[1]]] * 3, other=[[[0]]])
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    with pytest.raises(
        AnalysisInputError, match=r"group b .outcome=correct. has 3 units .* each half needs 2"
    ):
        expert_contrast(store, "run", a=REFUSED, b=CORRECT)
    with pytest.raises(
        AnalysisInputError, match=r"group b .outcome=other. has 1 unit .* a contrast needs 2"
    ):
        expert_contrast(store, "run", a=REFUSED, b={"outcome": ["other"]}, split=False)
    table = expert_contrast(store, "run", a=REFUSED, b=CORRECT, split=False)
    assert not any("no p can be below" in note for note in table.notes)  # 1 of 56 assignments
    few = Filters(fields={"prompt_id": ("0",)})
    with pytest.raises(AnalysisInputError, match="no field 'prompt_id'"):
        expert_contrast(store, "run", a=REFUSED, b=CORRECT, filters=few)


def test_too_few_units_for_any_confirmation_are_noted(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    items = outcome_items(lab, refused=[[[0]]] * 4, correct=[[[1]]] * 4)
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    table = expert_contrast(store, "run", a=REFUSED, b=CORRECT, candidates=2)
    assert any("no p can be below 0.333: nothing can be confirmed" in n for n in table.notes)
    assert not table.frame["confirmed"].any()
    assert table.frame["effect"].abs().max() == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"a": {"outcome": ["refuse"]}}, "group a .outcome=refuse. holds no prompt; outcome holds"),
        ({"b": {}}, "group b has no condition"),
        ({"b": {"outcome": ["refused", "correct"]}}, "36 prompts are in both groups"),
        ({"a": {"verdict": ["x"]}}, "no field 'verdict'"),
        ({"average": "mean"}, "average is 'mean'"),
        ({"candidates": 0}, "candidates is 0"),
        ({"q": 1.0}, "q is 1.0"),
        ({"bootstrap": 0}, "bootstrap is 0"),
        ({"permutations": 1_000}, "1000 permutations are too few for 50 candidates .* 20,000"),
        ({"permutations": 100, "split": False}, "too few for one level at q = 0.05; 400 or more"),
    ],
)
def test_bad_parameters_are_refused(planted: Store, changes: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"a": REFUSED, "b": CORRECT} | changes
    with pytest.raises(AnalysisInputError, match=match):
        expert_contrast(planted, "run", **arguments)
