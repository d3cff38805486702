"""Load, importance and balance against hand computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from moescope.probe.analysis import Filters, expert_load, load_balance
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


@pytest.fixture(scope="module")
def small(make_store: Callable[..., Store], lab: SimpleNamespace) -> Iterator[Store]:
    """Three tokens, K = 2, E = 4: expert 0 thrice, 1 twice, 2 once, 3 never; one token in de."""

    def token(*slots: tuple[int, float]) -> object:
        return lab.Token(slots={3: slots})

    items = [
        lab.Item(
            tokens=[token((0, 0.75), (1, 0.25)), token((0, 0.5), (1, 0.5))], fields={"lang": "en"}
        ),
        lab.Item(tokens=[token((0, 0.125), (2, 0.875))], fields={"lang": "de"}),
        lab.Item(tokens=[token((3, 0.5), (2, 0.5))], fields={"lang": None, "label": "other"}),
    ]
    yield from lab.held_open(make_store([lab.Shape(layer=3, num_experts=4, top_k=2)], items))


KEPT = Filters(fields={"lang": ("en", "de")})


def test_load_by_hand(small: Store) -> None:
    frame = expert_load(small, "run", filters=KEPT).frame
    assert frame["layer"].tolist() == [3] * 4
    assert frame["num_slots"].tolist() == [3, 2, 1, 0]
    assert frame["load"].tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert frame["token_share"].tolist() == pytest.approx([3 / 3, 2 / 3, 1 / 3, 0])
    assert frame["importance"].tolist() == pytest.approx([1.375 / 3, 0.75 / 3, 0.875 / 3, 0])
    assert set(frame["chance"]) == {0.5}
    assert set(frame["load_chance"]) == {0.25}
    assert set(frame["num_tokens"]) == {3}
    assert set(frame["num_prompts"]) == {2}


def test_load_by_field_leaves_out_prompts_without_a_value(small: Store) -> None:
    table = expert_load(small, "run", by="lang")
    german = table.frame[table.frame["value"] == "de"]
    assert german["token_share"].tolist() == [1, 0, 1, 0]
    assert set(german["num_tokens"]) == {1}
    assert table.notes == ("Prompts without a value of lang, left out: 1.",)
    assert (table.context.num_prompts, table.context.num_tokens) == (2, 3)


def test_balance_by_hand(small: Store) -> None:
    row = load_balance(small, "run", filters=KEPT).frame.iloc[0]
    shares = np.array([3, 2, 1]) / 6
    entropy = float(-(shares * np.log(shares)).sum())
    assert row["usage_entropy_nats"] == pytest.approx(entropy)
    assert row["usage_entropy"] == pytest.approx(entropy / np.log(4))
    # Sorted 0 1 2 3: (-3*0 - 1*1 + 1*2 + 3*3) / (4 * 6)
    assert row["gini"] == pytest.approx(10 / 24)
    assert row["imbalance"] == pytest.approx(3 / 1.5 - 1)
    assert row["cv"] == pytest.approx(np.std([3, 2, 1, 0]) / 1.5)
    assert (row["never_used"], row["top_expert"], row["top_expert_token_share"]) == (1, 0, 1)
    assert row["never_used_chance"] == pytest.approx(4 * 0.5**3)
    assert row["cv_chance"] == pytest.approx(np.sqrt(0.5 / (3 * 0.5)))


def test_chance_levels_are_those_of_uniform_routing() -> None:
    """Simulated: 200 independent tokens that select 2 of 16 experts uniformly."""
    rng = np.random.default_rng(3)
    picks = rng.random((400, 200, 16)).argsort(axis=2)[:, :, :2].reshape(400, -1)
    counts = np.stack([np.bincount(row, minlength=16) for row in picks])
    chance = 2 / 16
    expected = np.sqrt((1 - chance) / (200 * chance))
    observed_cv = counts.std(axis=1, ddof=1) / counts.mean(axis=1)
    assert np.sqrt((observed_cv**2).mean()) == pytest.approx(expected, rel=0.03)
    gaps = np.abs(counts[:, :, None] - counts[:, None, :]).sum(axis=(1, 2)) / (16 * 15)
    assert (gaps / 2 / counts.mean(axis=1)).mean() == pytest.approx(
        expected / np.sqrt(np.pi), rel=0.03
    )


@pytest.mark.parametrize("by", [None, "topic"])
def test_load_sums_to_one_and_token_share_to_k(random_store: Store, by: str | None) -> None:
    table = expert_load(random_store, "run", by=by)
    keys = ["layer"] if by is None else ["value", "layer"]
    sums = table.frame.groupby(keys)[["load", "importance", "token_share"]].sum()
    assert len(sums) == (3 if by is None else 9)
    np.testing.assert_allclose(sums["load"], 1)
    np.testing.assert_allclose(sums["importance"], 1)
    np.testing.assert_allclose(sums["token_share"], 2)


def test_balance_summarizes_the_load_table(random_store: Store) -> None:
    load, balance = expert_load(random_store, "run").frame, load_balance(random_store, "run").frame
    for row in balance.to_dict("records"):
        shares = load.loc[load["layer"] == row["layer"], "load"].to_numpy()
        assert row["usage_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum())
        assert row["imbalance"] == pytest.approx(shares.max() * 8 - 1)
        assert row["top_expert"] == shares.argmax()


def test_a_router_that_never_fires_for_a_value_has_no_rows(
    make_store: Callable[..., Store], lab: SimpleNamespace
) -> None:
    special = lab.tokens_of([[0]], is_special=True)
    items = [
        lab.Item(tokens=lab.tokens_of([[0], [1]]), fields={"lang": "en"}),
        lab.Item(tokens=special, fields={"lang": "de"}),
    ]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    frame = load_balance(store, "run", by="lang").frame
    assert frame["value"].tolist() == ["en"]
    assert isinstance(frame["value"].dtype, pd.StringDtype)


def test_unknown_and_empty_fields_are_refused(small: Store) -> None:
    with pytest.raises(AnalysisInputError, match=r"no field 'language'; they have .*lang"):
        expert_load(small, "run", by="language")
    with pytest.raises(AnalysisInputError, match="no selected prompt of run 'run' has a value"):
        expert_load(small, "run", by="domain")
