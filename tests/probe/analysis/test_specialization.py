"""Specialization: OLMoE's share by hand, its reverse, lift, and intervals over units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from moescope.probe.analysis import expert_specialization
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """K = 1, E = 3. law: 4 tokens, 3 on expert 0 and 1 on 1; code: 2 tokens, both on 1."""
    items = [
        lab.Item(tokens=lab.tokens_of([[0], [0], [1]]), fields={"domain": "law"}),
        lab.Item(tokens=lab.tokens_of([[0]]), fields={"domain": "law"}),
        lab.Item(tokens=lab.tokens_of([[1], [1]]), fields={"domain": "code"}),
        lab.Item(tokens=lab.tokens_of([[2]]), fields={}),
    ]
    yield from lab.held_open(make_store([lab.Shape(layer=0, num_experts=3, top_k=1)], items))


def test_shares_by_hand(small: Store) -> None:
    table = expert_specialization(small, "run", by="domain")
    frame = table.frame.set_index(["value", "expert"])
    assert frame.loc["law", "token_share"].tolist() == [0.75, 0.25, 0]
    assert frame.loc["code", "token_share"].tolist() == [0, 1, 0]
    # Equal weight for both values, though law has twice the tokens.
    assert frame.loc["law", "composition"].tolist()[:2] == pytest.approx([1, 0.2])
    assert frame.loc["code", "composition"].tolist()[:2] == pytest.approx([0, 0.8])
    assert frame["composition"].isna().groupby("expert").all().tolist() == [False, False, True]
    assert np.isnan(frame.at[("law", 0), "lift"])
    assert frame.at[("law", 1), "lift"] == pytest.approx(0.25)
    assert frame.at[("code", 1), "lift"] == pytest.approx(4)
    assert frame.at[("code", 0), "lift"] == 0
    assert set(frame["chance"]) == {1 / 3}
    assert set(frame["composition_chance"]) == {0.5}
    assert frame.at[("law", 0), "num_tokens"] == 4
    assert frame.at[("law", 0), "num_prompts"] == frame.at[("law", 0), "num_units"] == 2
    assert table.notes == ("Prompts without a value of domain, left out: 1.",)


def test_intervals_need_two_units(small: Store) -> None:
    frame = expert_specialization(small, "run", by="domain", bootstrap=200).frame
    assert frame.loc[frame["value"] == "code", ["low", "high"]].isna().all(axis=None)
    law = frame[frame["value"] == "law"].set_index("expert")
    # Draws of (3-token prompt, 1-token prompt): share of expert 0 is 2/3, 3/4 or 1.
    assert law.at[0, "low"] == pytest.approx(2 / 3)
    assert law.at[0, "high"] == 1


def test_shares_sum_to_k_and_compositions_to_one(random_store: Store) -> None:
    frame = expert_specialization(random_store, "run", by="lang", bootstrap=0).frame
    np.testing.assert_allclose(frame.groupby(["value", "layer"])["token_share"].sum(), 2)
    np.testing.assert_allclose(frame.groupby(["layer", "expert"])["composition"].sum(), 1)
    assert frame[["low", "high"]].isna().all(axis=None)


def test_intervals_resample_units_not_prompts(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    """Ten copies of each item say no more than one: with units the interval stays as wide."""
    rng = np.random.default_rng(1)
    items = []
    for unit in range(12):
        tokens = lab.tokens_of([[int(expert)] for expert in rng.integers(0, 2, 6)])
        items += [
            lab.Item(tokens=tokens, fields={"pair_id": f"p{unit}", "label": "x", "key": str(copy)})
            for copy in range(10)
        ]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    widths = {}
    for unit in ("pair_id", "domain"):
        frame = expert_specialization(store, "run", by="label", unit=unit).frame
        widths[unit] = frame.at[0, "high"] - frame.at[0, "low"]
        assert frame.at[0, "num_units"] == (12 if unit == "pair_id" else 120)
    assert 2.2 < widths["pair_id"] / widths["domain"] < 4.5  # sqrt(10) apart


def test_the_interval_is_seeded(random_store: Store) -> None:
    one, same, other = (
        expert_specialization(random_store, "run", by="lang", bootstrap=50, seed=seed).frame
        for seed in (1, 1, 2)
    )
    assert one.equals(same)
    assert not one["low"].equals(other["low"])


def test_bad_parameters_are_refused(small: Store) -> None:
    with pytest.raises(AnalysisInputError, match="bootstrap is -1"):
        expert_specialization(small, "run", by="domain", bootstrap=-1)
    with pytest.raises(AnalysisInputError, match="no field 'units'"):
        expert_specialization(small, "run", by="domain", unit="units")


def test_too_many_values_are_refused(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.probe.analysis.selection.MOST_ROWS", 5)
    with pytest.raises(AnalysisInputError, match="'domain' has 2 values for 3 experts"):
        expert_specialization(small, "run", by="domain")
