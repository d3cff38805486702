"""The statistics against brute force, exhaustive enumeration and scipy."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moescope.probe.analysis.cells import Cells, difference, unit_interval
from moescope.probe.analysis.statistics import (
    SMALLEST_ERROR,
    Parts,
    StudentizedDifference,
    benjamini_hochberg,
    bootstrap_weights,
    percentile_interval,
    permutation_p,
    permuted_labels,
    rank_correlation,
    smallest_p,
    split_halves,
    step_down_max_t,
    strongest,
    top_overlap,
)


def draw_parts(seed: int, *, only_a: int, only_b: int, matched: int, experts: int = 4) -> Parts:
    """Random counts; units with both labels first, then a only, then b only."""
    rng = np.random.default_rng(seed)
    units = [*range(matched)] * 2 + [*range(matched, matched + only_a + only_b)]
    is_a = [True] * matched + [False] * matched + [True] * only_a + [False] * only_b
    tokens = rng.integers(5, 60, len(units)).astype(float)
    shares = rng.beta(2, 5, (len(units), experts))
    return Parts(
        counts=rng.binomial(tokens[:, None].astype(int), shares).astype(float),
        tokens=tokens,
        units=np.asarray(units),
        is_a=np.asarray(is_a),
    )


def per_unit(parts: Parts) -> Parts:
    """Rates as counts and one token each, so that the pooled effect is the mean over units."""
    rates = parts.counts / parts.tokens[:, None]
    return replace(parts, counts=rates, tokens=np.ones(len(parts.tokens)))


def effect_interval(
    parts: Parts, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the difference, from the cells that these parts are."""
    cells = Cells(
        counts=parts.counts, tokens=parts.tokens, units=parts.units,
        classes=(~parts.is_a).astype(np.int64), num_classes=2,
    )  # fmt: skip
    return unit_interval(cells, difference, draws, rng)


def brute_statistic(parts: Parts, is_a: np.ndarray, expert: int) -> float:
    """The studentized difference of one relabelling, written out unit by unit."""
    count, tokens = parts.counts[:, expert], parts.tokens
    size = {True: is_a.sum(), False: (~is_a).sum()}
    total = {True: tokens[is_a].sum(), False: tokens[~is_a].sum()}
    rate = {True: count[is_a].sum() / total[True], False: count[~is_a].sum() / total[False]}
    variance = 0.0
    for unit in np.unique(parts.units):
        terms = [
            (1 if is_a[i] else -1)
            * (count[i] - rate[bool(is_a[i])] * tokens[i])
            / total[bool(is_a[i])]
            * np.sqrt(size[bool(is_a[i])] / (size[bool(is_a[i])] - 1))
            for i in np.flatnonzero(parts.units == unit)
        ]
        variance += sum(terms) ** 2
    return (rate[True] - rate[False]) / np.sqrt(variance + SMALLEST_ERROR**2)


@pytest.mark.parametrize(("only_a", "only_b", "matched"), [(4, 6, 0), (0, 0, 5), (3, 2, 4)])
def test_studentized_difference_by_brute_force(only_a: int, only_b: int, matched: int) -> None:
    parts = draw_parts(1, only_a=only_a, only_b=only_b, matched=matched)
    for half in (parts, per_unit(parts)):
        labels = permuted_labels(half, 20, np.random.default_rng(2))
        labels[0] = half.is_a
        found = StudentizedDifference(half)(labels)
        for row, is_a in enumerate(labels):
            for expert in range(4):
                expected = brute_statistic(half, is_a, expert)
                assert found[row, expert] == pytest.approx(expected, rel=1e-9)


def test_unpaired_rates_give_welchs_t() -> None:
    parts = per_unit(draw_parts(5, only_a=7, only_b=9, matched=0))
    a, b = parts.counts[parts.is_a], parts.counts[~parts.is_a]
    welch = stats.ttest_ind(a, b, equal_var=False).statistic
    assert StudentizedDifference(parts)(parts.is_a[None])[0] == pytest.approx(welch, rel=1e-6)


def test_matched_rates_give_the_paired_t() -> None:
    parts = per_unit(draw_parts(6, only_a=0, only_b=0, matched=8))
    paired = stats.ttest_rel(parts.counts[parts.is_a], parts.counts[~parts.is_a]).statistic
    assert StudentizedDifference(parts)(parts.is_a[None])[0] == pytest.approx(paired, rel=1e-6)


def test_effects_by_hand() -> None:
    parts = Parts(
        counts=np.array([[3.0], [1.0], [2.0]]),
        tokens=np.array([4.0, 16.0, 8.0]),
        units=np.array([0, 1, 2]),
        is_a=np.array([True, True, False]),
    )
    assert parts.effects() == pytest.approx([4 / 20 - 2 / 8])
    assert per_unit(parts).effects() == pytest.approx([(3 / 4 + 1 / 16) / 2 - 2 / 8])


def every_assignment(parts: Parts) -> list[np.ndarray]:
    in_a, in_b = parts.matched()
    single = np.setdiff1d(np.arange(len(parts.is_a)), np.r_[in_a, in_b])
    number = int(parts.is_a[single].sum())
    assignments = []
    for chosen in combinations(single, number):
        for kept in product([True, False], repeat=len(in_a)):
            is_a = np.zeros(len(parts.is_a), dtype=bool)
            is_a[list(chosen)] = True
            is_a[in_a], is_a[in_b] = kept, ~np.array(kept, dtype=bool)
            assignments.append(is_a)
    return assignments


@pytest.mark.parametrize(("only_a", "only_b", "matched"), [(3, 4, 0), (0, 0, 5), (2, 2, 3)])
def test_permutation_p_is_that_of_all_assignments(only_a: int, only_b: int, matched: int) -> None:
    parts = draw_parts(11, only_a=only_a, only_b=only_b, matched=matched)
    every = np.array(every_assignment(parts))
    drawn = np.abs(StudentizedDifference(parts)(every))
    observed = np.abs(StudentizedDifference(parts)(parts.is_a[None])[0])
    exact = (drawn >= observed * (1 - 1e-6)).mean(axis=0)
    found = permutation_p(parts, 20_000, np.random.default_rng(0))
    assert found == pytest.approx(exact, abs=0.012)
    assert len(np.unique(every, axis=0)) == len(every)
    floor = smallest_p(parts)
    assert (exact >= floor - 1e-12).all()
    assert round(floor * len(every), 9) in (1, 2)


def test_smallest_p_is_reached_by_perfect_separation() -> None:
    parts = Parts(
        counts=np.array([[9.0], [9.0], [9.0], [0.0], [0.0], [0.0]]),
        tokens=np.full(6, 9.0),
        units=np.arange(6),
        is_a=np.array([True, True, True, False, False, False]),
    )
    assert smallest_p(parts) == pytest.approx(2 / 20)
    assert permutation_p(parts, 20_000, np.random.default_rng(1))[0] == pytest.approx(0.1, abs=0.01)


def test_max_t_by_brute_force() -> None:
    parts = draw_parts(21, only_a=12, only_b=12, matched=0, experts=5)
    parts.counts[parts.is_a, 2] = parts.tokens[parts.is_a]
    found = step_down_max_t(parts, 500, np.random.default_rng(3))
    labels = permuted_labels(parts, 500, np.random.default_rng(3))
    drawn = np.abs(StudentizedDifference(parts)(labels))
    observed = np.abs(StudentizedDifference(parts)(parts.is_a[None])[0])
    previous = 0.0
    for place, expert in enumerate(order := np.argsort(-observed)):
        largest = drawn[:, order[place:]].max(axis=1)
        p = (1 + (largest >= observed[expert] * (1 - 1e-6)).sum()) / 501
        previous = max(previous, p)
        assert found[expert] == pytest.approx(previous)
    assert order[0] == 2
    assert found[2] < 0.01


def test_draws_in_chunks_are_valid_relabellings() -> None:
    parts = draw_parts(2, only_a=3, only_b=5, matched=4)
    labels = permuted_labels(parts, 3_000, np.random.default_rng(0))
    in_a, in_b = parts.matched()
    assert (labels[:, in_a] != labels[:, in_b]).all()
    assert set(labels.sum(axis=1)) == {7}
    np.testing.assert_allclose(labels[:, in_a].mean(axis=0), 0.5, atol=0.05)
    np.testing.assert_allclose(labels[:, 8:].mean(axis=0), 3 / 8, atol=0.05)


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted .01 .02 .03 .5 of 4: 4*.01, 2*.02, 4/3*.03, .5, then minima from the right.
    adjusted = benjamini_hochberg(np.array([0.02, 0.5, 0.01, 0.03]))
    assert adjusted == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert len(benjamini_hochberg(np.array([]))) == 0


def test_bootstrap_interval_covers_the_truth() -> None:
    """90 of 100 intervals at least: units differ, and lengths go with rates."""
    covered = 0
    rng = np.random.default_rng(8)
    for _ in range(100):
        tokens = rng.integers(20, 80, 60)
        rates = np.where(np.arange(60) < 30, 0.3, 0.2) * rng.uniform(0.5, 1.5, 60)
        parts = Parts(
            counts=rng.binomial(tokens, rates).astype(float)[:, None],
            tokens=tokens.astype(float),
            units=np.arange(60),
            is_a=np.arange(60) < 30,
        )
        low, high = effect_interval(parts, 300, rng)
        covered += bool(low[0] <= 0.1 <= high[0])
    assert 90 <= covered <= 100


def test_matched_units_are_drawn_together() -> None:
    """Where both parts of every unit move alike, the difference does not vary at all."""
    shares = np.linspace(0.1, 0.8, 10)
    tokens = np.full(10, 100.0)
    counts = np.r_[100 * (shares + 0.1), 100 * shares][:, None]
    parts = Parts(
        counts=counts,
        tokens=np.r_[tokens, tokens],
        units=np.r_[np.arange(10), np.arange(10)],
        is_a=np.r_[np.ones(10, dtype=bool), np.zeros(10, dtype=bool)],
    )
    low, high = effect_interval(parts, 200, np.random.default_rng(0))
    assert (low[0], high[0]) == pytest.approx((0.1, 0.1))


def test_weights_draw_as_many_units_as_there_are() -> None:
    weights = bootstrap_weights(7, 50, np.random.default_rng(0))
    assert weights.shape == (50, 7)
    assert set(weights.sum(axis=1)) == {7}


def test_percentile_interval_by_hand() -> None:
    draws = np.arange(101.0)[:, None]
    low, high = percentile_interval(draws)
    assert (low[0], high[0]) == pytest.approx((2.5, 97.5))
    with_gaps = np.concatenate([draws, np.full((9, 1), np.nan)])
    assert percentile_interval(with_gaps)[0] == pytest.approx(low)
    assert np.isnan(percentile_interval(np.full((3, 2), np.nan))).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 1_000))
def test_halves_are_even_in_every_stratum(strata: list[int], seed: int) -> None:
    stratum = np.array(strata)
    first = split_halves(stratum, np.random.default_rng(seed))
    for low in range(5):
        for high in range(low, 5):
            run = (stratum >= low) & (stratum <= high)
            assert abs(int(first[run].sum()) - int((~first[run]).sum())) <= 1


def test_halves_depend_on_the_seed() -> None:
    stratum = np.zeros(40, dtype=np.int64)
    draws = {tuple(split_halves(stratum, np.random.default_rng(seed))) for seed in range(20)}
    assert len(draws) == 20


def test_stability_by_hand() -> None:
    first, second = np.array([0.5, -0.4, 0.1, 0.0]), np.array([0.1, -0.9, 0.2, 0.0])
    assert strongest(first, 2).tolist() == [0, 1]
    assert strongest(first, 9).tolist() == [0, 1, 2]
    assert top_overlap(first, second, 2) == 0.5
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second)[0])
    assert np.isnan(rank_correlation(first, np.zeros(4)))
