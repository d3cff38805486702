"""Rates, changes and intervals against closed forms and brute force."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest

from moescope.steering.rates import Measured, mean_over_units, measured_frame, rate


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (47, 94), (1, 1)])
def test_a_rate_has_the_interval_of_wilson(hits: int, n: int) -> None:
    value, low, high = rate([True] * hits + [False] * (n - hits))
    p, z = hits / n, 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert value == p
    assert low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert high == pytest.approx(min(1.0, middle + half), abs=1e-9)


def test_the_interval_over_units_is_the_bootstrap_distribution() -> None:
    values = [1.0, 0.0, -1.0, 0.5, 0.0, 1.0]
    units = ["a", "a", "b", "c", "c", "c"]
    mean, low, high = mean_over_units(values, units, seed=0)
    assert mean == pytest.approx(0.25)
    members = [[1.0, 0.0], [-1.0], [0.5, 0.0, 1.0]]
    exact = [
        sum(sum(members[unit]) for unit in draw) / sum(len(members[unit]) for unit in draw)
        for draw in product(range(3), repeat=3)
    ]
    expected = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert [low, high] == pytest.approx(expected.tolist())


def test_the_seed_decides_the_draws() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    units = [str(at) for at in range(40)]
    assert mean_over_units(values, units, seed=1) == mean_over_units(values, units, seed=1)
    assert mean_over_units(values, units, seed=1) != mean_over_units(values, units, seed=2)


def test_resampling_units_widens_the_interval_of_repeated_prompts() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 2, 20).astype(float)
    values = np.repeat(distinct, 10).tolist()
    _, low, high = mean_over_units(values, [str(i // 10) for i in range(200)], seed=1)
    _, naive_low, naive_high = mean_over_units(values, [str(i) for i in range(200)], seed=1)
    assert low is not None
    assert high is not None
    assert naive_low is not None
    assert naive_high is not None
    assert high - low > 2 * (naive_high - naive_low)


def test_one_unit_gives_no_interval_and_constants_a_point() -> None:
    assert mean_over_units([1.0, 0.0], ["a", "a"], seed=0) == (0.5, None, None)
    assert mean_over_units([0.0, 0.0], ["a", "b"], seed=0) == (0.0, 0.0, 0.0)


def test_missing_numbers_become_nan_in_the_table() -> None:
    frame = measured_frame([
        Measured(condition="steered", group="all", metric="achieved", value=None, n=0),
        Measured(condition="steered", group="g", metric="m", value=1.0, low=0.5, high=1.0, n=4),
    ])  # fmt: skip
    assert list(frame.columns) == ["condition", "group", "metric", "value", "low", "high", "n"]
    assert frame["value"].isna().tolist() == [True, False]
    assert measured_frame([]).empty
