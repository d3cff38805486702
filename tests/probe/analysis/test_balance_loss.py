"""The load-balancing loss: by hand, its bounds, and the gap of prompts that specialize."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.probe.analysis.filters import Filters
from moescope.probe.analysis.usage.balance_loss import balance_loss, loss
from moescope.probe.errors import AnalysisInputError
from moescope.probe.storage.store import Store


def prompt(lab: SimpleNamespace, experts: list[int], scores: list[list[float]]) -> Any:
    tokens = [
        lab.Token(slots={0: [(expert, score[expert])]}, scores={0: score})
        for expert, score in zip(experts, scores, strict=True)
    ]
    return lab.Item(tokens=tokens)


def test_two_prompts_by_hand(make_store: Callable[..., Store], lab: SimpleNamespace) -> None:
    """K = 1, E = 2. Prompt one uses expert 0 alone, prompt two expert 1, then 0."""
    items = [
        prompt(lab, [0, 0], [[0.9, 0.1], [0.7, 0.3]]),
        prompt(lab, [1, 0], [[0.2, 0.8], [0.6, 0.4]]),
    ]
    store = make_store([lab.Shape(layer=0, num_experts=2, top_k=1)], items)
    table = balance_loss(store, "run", batch_size=2)
    row = table.frame.iloc[0]
    assert row["loss_sequence"] == pytest.approx((2 * 0.8 + 2 * (0.5 * 0.4 + 0.5 * 0.6)) / 2)
    assert row["loss_corpus"] == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    assert row["loss_batch"] == pytest.approx(row["loss_corpus"])
    assert row["gap"] == pytest.approx(row["loss_sequence"] - row["loss_corpus"])
    assert row["loss_balanced"] == 1
    assert (row["num_tokens"], row["num_prompts"], row["num_units"]) == (4, 2, 2)
    one = balance_loss(store, "run", batch_size=1).frame.iloc[0]
    assert one["loss_batch"] == pytest.approx(one["loss_sequence"])
    # Without a rule it is not known what the weights are.
    assert np.isnan(row["gap_chance"])
    assert any("gap_chance is missing in 1 of 1" in note for note in table.notes)


@given(st.integers(0, 10_000), st.integers(2, 8))
def test_loss_is_k_when_all_are_used_alike(seed: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, experts + 1))
    scores = rng.dirichlet(np.ones(experts)) * 30
    even = np.full(experts, 30 * k / experts)
    assert loss(even, scores, np.array(30.0)) == pytest.approx(k)
    counts = rng.integers(0, 31, experts).astype(float)
    assert 0 <= loss(counts, scores, np.array(30.0)) <= experts + 1e-9
    order = rng.permutation(experts)
    tokens = np.array(30.0)
    assert loss(counts[order], scores[order], tokens) == pytest.approx(loss(counts, scores, tokens))


def topics(lab: SimpleNamespace, rng: np.random.Generator, *, apart: float) -> list[Any]:
    """40 prompts of 12 tokens; logits of four experts of six are raised by topic."""
    items = []
    for number in range(40):
        favored = np.isin(np.arange(6), [number % 6, (number + 1) % 6]) * apart
        tokens = []
        for _ in range(12):
            exponent = np.exp(rng.normal(size=6) + favored)
            score = exponent / exponent.sum()
            chosen = np.argsort(-score)[:2]
            tokens.append(
                lab.Token(slots={0: [(int(e), float(score[e])) for e in chosen]},
                          scores={0: score.tolist()})
            )  # fmt: skip
        items.append(lab.Item(tokens=tokens))
    return items


@pytest.mark.parametrize("apart", [0.0, 1.5])
def test_the_gap_is_that_of_chance_unless_prompts_specialize(
    make_store: Callable[..., Store], lab: SimpleNamespace, apart: float
) -> None:
    items = topics(lab, np.random.default_rng(5), apart=apart)
    store = make_store([lab.Shape(layer=0, num_experts=6, top_k=2)], items)
    rule = json.dumps({"score": "softmax", "weights": "score", "renormalize": False, "scale": 1.0})
    lab.edit(store, ("UPDATE layers SET rule = ?", [rule]))
    row = balance_loss(store, "run").frame.iloc[0]
    tokens = [token for item in items for token in item.tokens]
    rng = np.random.default_rng(1)
    shuffled = [gap_of(tokens, rng.permutation(len(tokens))) for _ in range(200)]
    assert gap_of(tokens, np.arange(len(tokens))) == pytest.approx(row["gap"], abs=1e-6)
    assert row["gap_chance"] == pytest.approx(np.mean(shuffled), abs=0.004)
    assert (row["gap_low"] > row["gap_chance"]) == (apart > 0)
    assert row["loss_sequence"] > row["loss_batch"] > row["loss_corpus"]


def gap_of(tokens: list[Any], order: np.ndarray) -> float:
    """The gap when these tokens are dealt to prompts of 12 in this order."""
    chosen, scores = np.zeros((2, len(tokens), 6))
    for row, token in enumerate(tokens):
        chosen[row, [expert for expert, _ in token.slots[0]]] = 1
        scores[row] = token.scores[0]
    chosen, scores = chosen[order], scores[order]
    by_prompt = [part.reshape(40, 12, 6).mean(axis=1) for part in (chosen, scores)]
    sequence = 6 * (by_prompt[0] * by_prompt[1]).sum(axis=1).mean()
    return float(sequence - 6 * (chosen.mean(axis=0) * scores.mean(axis=0)).sum())


def test_levels_agree_with_loops_over_usage(random_store: Store) -> None:
    frame = balance_loss(random_store, "run", filters=Filters(tokens="prompt")).frame
    usage = random_store.query(
        "SELECT prompt_id, layer, expert, sum(num_tokens)::DOUBLE AS n, "
        "sum(prob_sum)::DOUBLE AS p FROM usage "
        "WHERE phase = 'prompt' AND segment != 'template' AND NOT is_special GROUP BY ALL"
    )
    for row in frame.to_dict("records"):
        own = usage[usage["layer"] == row["layer"]]
        total = weighted = 0.0
        for _, one in own.groupby("prompt_id"):
            tokens = one["n"].sum() / 2
            weighted += 8 * (one["n"] / tokens * one["p"] / one["p"].sum()).sum() * tokens
            total += tokens
        assert row["loss_sequence"] == pytest.approx(weighted / total)
        assert row["gap_low"] < row["gap"] < row["gap_high"]


@pytest.mark.parametrize("by", ["lang", "phase"])
def test_rows_of_a_value_are_those_of_its_prompts_alone(random_store: Store, by: str) -> None:
    table = balance_loss(random_store, "run", by=by, bootstrap=20)
    values = list(dict.fromkeys(table.frame["value"]))
    assert values == (["de", "en", "zh"] if by == "lang" else ["prompt", "generated"])
    for value in values:
        kept = Filters(fields={"lang": (value,)}) if by == "lang" else Filters(tokens=value)
        alone = balance_loss(random_store, "run", filters=kept, bootstrap=0).frame
        own = table.frame[table.frame["value"] == value]
        for name in ("loss_sequence", "loss_corpus", "gap", "num_tokens", "num_prompts"):
            assert own[name].tolist() == pytest.approx(alone[name].tolist())
    with pytest.raises(AnalysisInputError, match="position cannot be picked out"):
        balance_loss(random_store, "run", by="position")


def test_what_cannot_be_computed_is_refused(random_store: Store) -> None:
    with pytest.raises(AnalysisInputError, match="batch_size is 0"):
        balance_loss(random_store, "run", batch_size=0)
    with pytest.raises(AnalysisInputError, match="router scores are summed over whole phases"):
        balance_loss(random_store, "run", filters=Filters(tokens="last_prompt"))
