"""Intervals over units: by hand, against brute force, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moescope.probe.analysis.intervals import (
    jackknife_groups,
    jackknife_interval,
    ratio_interval,
)


def of_units(counts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    low, high = ratio_interval(
        counts.sum(), sizes.sum(), squares=(counts**2).sum(), crosses=(counts * sizes).sum(),
        squared_denominators=(sizes**2).sum(), num_units=(sizes > 0).sum(),
    )  # fmt: skip
    return float(low), float(high)


def test_equal_units_give_the_t_interval_of_a_mean() -> None:
    rates = np.array([0.2, 0.4, 0.3, 0.7, 0.5])
    low, high = of_units(rates * 10, np.full(5, 10.0))
    expected = stats.t.interval(0.95, 4, rates.mean(), stats.sem(rates))
    assert (low, high) == pytest.approx(expected)


def test_edges() -> None:
    assert of_units(np.array([3.0]), np.array([6.0])) == pytest.approx((np.nan,) * 2, nan_ok=True)
    assert of_units(np.array([3.0, 1.0]), np.array([6.0, 2.0])) == pytest.approx((0.5, 0.5))
    low, high = of_units(np.array([6.0, 0.0]), np.array([6.0, 2.0]))
    assert (low, high) == (0, 1)
    assert of_units(np.zeros(3), np.zeros(3)) == pytest.approx((np.nan,) * 2, nan_ok=True)


def test_intervals_hold_the_truth_where_units_differ() -> None:
    """95 % within what 400 draws allow: rates go with the sizes of units."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        rates = rng.beta(2, 6, 60)
        sizes = rng.integers(5, 100, 60)
        low, high = of_units(rng.binomial(sizes, rates).astype(float), sizes.astype(float))
        held += low <= 0.25 <= high
    assert stats.binom.ppf(0.001, 400, 0.93) <= held <= stats.binom.ppf(0.999, 400, 0.96)


def test_jackknife_of_a_mean_is_its_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=12)
    without = np.array([[np.delete(values, left).mean()] for left in range(12)])
    low, high = jackknife_interval(np.array([values.mean()]), without)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert (low[0], high[0]) == pytest.approx(expected)
    missing = jackknife_interval(np.array([1.0]), without[:1])
    assert np.isnan(missing).all()


def test_groups_are_even_and_keep_units_together() -> None:
    unit_P = np.repeat(np.arange(47), 3)
    group_P, number = jackknife_groups(unit_P, np.random.default_rng(1))
    assert number == 20
    assert (group_P.reshape(47, 3) == group_P.reshape(47, 3)[:, :1]).all()
    sizes = np.bincount(group_P[::3])
    assert set(sizes) == {2, 3}
    assert jackknife_groups(np.array([0, 1, 1]), np.random.default_rng(1))[1] == 2
