"""What holds of every run: sums, bounds, and that names of experts mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moescope.probe.analysis import (
    delta_experts,
    expert_contrast,
    expert_load,
    expert_specialization,
    load_balance,
)
from moescope.probe.storage.store import Store

WRITES_STORES = settings(
    max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
EXPERTS = 6


def drawn_run(lab: SimpleNamespace, seed: int, names: list[int]) -> tuple[list[Any], list[Any]]:
    """12 prompts in two languages and labels; `names` is what each expert is called."""
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, 4))
    items = []
    for number in range(12):
        tokens = []
        for _ in range(int(rng.integers(3, 9))):
            chosen = rng.choice(EXPERTS, top_k, replace=False, p=rng.dirichlet(np.full(6, 2.0)))
            weights = rng.dirichlet(np.ones(top_k))
            slots = [(names[e], float(w)) for e, w in zip(chosen, weights, strict=True)]
            tokens.append(lab.Token(slots={0: slots}))
        fields = {"lang": ("de", "en")[number % 2], "label": "ab"[number // 6]}
        items.append(lab.Item(tokens=tokens, fields=fields))
    return [lab.Shape(layer=0, num_experts=EXPERTS, top_k=top_k)], items


@WRITES_STORES
@given(st.integers(0, 10_000))
def test_sums_and_bounds(make_store: Callable[..., Store], lab: SimpleNamespace, seed: int) -> None:
    shapes, items = drawn_run(lab, seed, list(range(EXPERTS)))
    store, top_k = make_store(shapes, items), shapes[0].top_k
    load = expert_load(store, "run").frame
    assert load["load"].sum() == pytest.approx(1)
    assert load["importance"].sum() == pytest.approx(1)
    assert load["token_share"].sum() == pytest.approx(top_k)
    balance = load_balance(store, "run").frame.iloc[0]
    assert 0 <= balance["usage_entropy"] <= 1 + 1e-9
    assert 0 <= balance["gini"] <= 1 - 1 / EXPERTS
    assert balance["never_used"] == (load["num_slots"] == 0).sum()
    special = expert_specialization(store, "run", by="lang", bootstrap=30).frame
    shares = special.groupby("value")["token_share"].sum()
    assert shares.tolist() == pytest.approx([top_k, top_k])
    used = special.groupby("expert")["composition"].sum(min_count=1).dropna()
    assert used.tolist() == pytest.approx([1.0] * len(used))
    assert (special["low"] <= special["high"]).all()
    there = delta_experts(store, "run", by="lang", reference="en", bootstrap=0).frame
    back = delta_experts(store, "run", by="lang", reference="de", bootstrap=0).frame
    deltas = [frame.set_index("expert").sort_index()["delta"] for frame in (there, back)]
    assert deltas[0].tolist() == pytest.approx((-deltas[1]).tolist())
    assert deltas[0].sum() == pytest.approx(0, abs=1e-6)
    contrast = expert_contrast(
        store, "run", a={"lang": ["de"]}, b={"lang": ["en"]}, split=False, bootstrap=20,
        permutations=400,
    ).frame  # fmt: skip
    assert contrast["risk_difference"].sum() == pytest.approx(0, abs=1e-6)
    assert ((contrast["p"] > 0) & (contrast["p"] <= 1)).sum() == contrast["candidate"].sum()


@WRITES_STORES
@given(st.integers(0, 10_000))
def test_names_of_experts_mean_nothing(
    make_store: Callable[..., Store], lab: SimpleNamespace, seed: int
) -> None:
    names = np.random.default_rng(seed + 1).permutation(EXPERTS).tolist()
    plain = make_store(*drawn_run(lab, seed, list(range(EXPERTS))))
    renamed = make_store(*drawn_run(lab, seed, names))
    for ask, keys, measures in (
        (expert_load, [], ["load", "token_share", "importance"]),
        (lambda *run: expert_specialization(*run, by="label", bootstrap=0), ["value"],
         ["token_share", "composition", "lift"]),
        (lambda *run: delta_experts(*run, by="lang", reference="en", bootstrap=0), ["value"],
         ["rate", "delta"]),
        (lambda *run: expert_contrast(*run, a={"label": ["a"]}, b={"label": ["b"]}, split=False,
                                      bootstrap=1, permutations=400, method="log_odds"), [],
         ["score", "risk_difference", "p"]),
    ):  # fmt: skip
        first, second = ask(plain, "run").frame, ask(renamed, "run").frame
        first = first.assign(expert=[names[expert] for expert in first["expert"]])
        order = [*keys, "expert"]
        pd.testing.assert_frame_equal(
            first.sort_values(order, ignore_index=True)[[*order, *measures]],
            second.sort_values(order, ignore_index=True)[[*order, *measures]],
            check_exact=False,
            rtol=1e-6,
        )
    alike = load_balance(plain, "run").frame, load_balance(renamed, "run").frame
    for name in ("usage_entropy", "gini", "imbalance", "cv", "never_used"):
        assert alike[0][name].tolist() == pytest.approx(alike[1][name].tolist())
