"""Entropy, balance and divergence against hand computation and their bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moescope.probe.analysis.measures import (
    coefficient_of_variation,
    divide,
    entropy_nats,
    entropy_normalized_jsd,
    gini,
    imbalance,
    jensen_shannon,
    normalize,
)


def distributions(size: int) -> st.SearchStrategy[np.ndarray]:
    """Distributions over `size` experts, zeros included."""
    amounts = arrays.arrays(np.float64, size, elements=st.floats(0, 1e6, allow_subnormal=False))
    return amounts.filter(lambda x: x.sum() > 1e-3).map(lambda x: x / x.sum())


def test_entropy_by_hand() -> None:
    assert entropy_nats(np.array([0.5, 0.25, 0.25])) == pytest.approx(1.5 * np.log(2))
    assert entropy_nats(np.array([1.0, 0.0])) == 0


def test_gini_by_hand() -> None:
    # Mean absolute difference of (1, 3): 1 over all ordered pairs; half of it over the mean 2.
    assert gini(np.array([3.0, 1.0])) == pytest.approx(0.25)
    assert gini(np.array([0.0, 0.0, 0.0, 5.0])) == pytest.approx(0.75)
    assert gini(np.full(6, 2.0)) == pytest.approx(0)
    assert np.isnan(gini(np.zeros(3)))


@given(arrays.arrays(np.float64, 7, elements=st.floats(0, 1e6)).filter(lambda x: x.sum() > 1e-3))
def test_gini_is_half_the_relative_mean_difference(values: np.ndarray) -> None:
    brute = np.abs(values[:, None] - values[None, :]).mean() / 2 / values.mean()
    assert gini(values) == pytest.approx(brute, abs=1e-9)


def test_imbalance_and_variation_by_hand() -> None:
    counts = np.array([[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]])
    assert imbalance(counts) == pytest.approx([0.5, 0])
    assert coefficient_of_variation(counts) == pytest.approx([np.sqrt(8 / 3) / 4, 0])


def test_jsd_by_hand() -> None:
    # m = (3/4, 1/4): 1/2 ln(4/3) + 1/2 (1/2 ln(2/3) + 1/2 ln 2)
    expected = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_disjoint_one_hots_have_ln2_over_ln_experts(size: int) -> None:
    p, q = np.eye(size)[0], np.eye(size)[size - 1]
    assert jensen_shannon(p, q) == pytest.approx(np.log(2))
    assert entropy_normalized_jsd(p, q) == pytest.approx(np.log(2) / np.log(size))


def test_normalized_jsd_of_uniform_distributions_is_undefined() -> None:
    uniform = np.full(16, 1 / 16)
    assert np.isnan(entropy_normalized_jsd(uniform, uniform))
    assert jensen_shannon(uniform, uniform) == 0


@given(distributions(9), distributions(9))
def test_jsd_bounds_and_symmetry(p: np.ndarray, q: np.ndarray) -> None:
    value = float(jensen_shannon(p, q))
    assert 0 <= value <= np.log(2)
    assert value == pytest.approx(float(jensen_shannon(q, p)), abs=1e-12)
    assert float(jensen_shannon(p, p)) == 0
    mixture = entropy_nats((p + q) / 2) - (entropy_nats(p) + entropy_nats(q)) / 2
    assert value == pytest.approx(float(mixture), abs=1e-9)
    normalized = float(entropy_normalized_jsd(p, q))
    assert np.isnan(normalized) or 0 <= normalized <= 1 + 1e-6


def test_undefined_ratios_are_missing() -> None:
    assert np.isnan(divide([1.0, 0.0], 0)).all()
    assert np.isnan(normalize(np.zeros((2, 3)))).all()
    assert normalize(np.array([1.0, 3.0])).tolist() == [0.25, 0.75]
