"""How sure a number is, over units: ratios with their standard error, anything else by groups.

A *unit* is what was sampled independently (a prompt, or an item with all its translations), never
a token. Two ways, neither of which draws at random:

- ratios of sums over units (a share of tokens, of slots, of uses) have the linearized standard
  error of a ratio estimator: with r = sum n / sum d, the variance is
  U / (U - 1) * sum over units of (n_u - r d_u)^2 / (sum d)^2  (Cochran, Sampling Techniques, 6.4);
- numbers that are no ratio (information, entropies) are computed again without each of some groups
  of units: the delete-a-group jackknife (Kott, J. Official Statistics 17, 2001).

Letters: U units, G groups of units, X values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moescope.probe.analysis.measures import FloatArray, divide
from moescope.probe.analysis.selection import IntArray

COVERAGE = 0.95
MOST_GROUPS = 20
"""Groups of units that a jackknife leaves out in turn."""


def ratio_interval(
    numerator: Any,
    denominator: Any,
    *,
    squares: Any,
    crosses: Any,
    squared_denominators: Any,
    num_units: Any,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[FloatArray, FloatArray]:
    """95 % interval of numerator / denominator, elementwise over arrays that broadcast.

    Args:
        numerator: sum over units of n_u.
        denominator: sum over units of d_u.
        squares: sum over units of n_u^2.
        crosses: sum over units of n_u d_u.
        squared_denominators: sum over units of d_u^2.
        num_units: units with d_u > 0.
        bounds: smallest and largest possible value; the interval is cut there.

    Returns:
        Lower and upper ends; NaN where the ratio is undefined or fewer than 2 units have it. Where
        no unit differs from another (all have the ratio) both ends are the ratio itself.
    """
    ratio = divide(numerator, denominator)
    units = np.asarray(num_units, dtype=np.float64)
    residual = np.asarray(squares) - 2 * ratio * crosses + ratio**2 * squared_denominators
    several = np.maximum(units, 2)
    variance = several / (several - 1) * np.maximum(residual, 0)
    error = divide(np.sqrt(variance), denominator)
    reach = stats.t.ppf((1 + COVERAGE) / 2, several - 1) * error
    reach = np.where(units >= 2, reach, np.nan)
    return np.clip(ratio - reach, *bounds), np.clip(ratio + reach, *bounds)


def jackknife_groups(unit_P: IntArray, rng: np.random.Generator) -> tuple[IntArray, int]:
    """Deal units into at most 20 groups at random: the group of each prompt, and their number."""
    num_units = int(unit_P.max()) + 1
    number = min(MOST_GROUPS, num_units)
    group_U = rng.permutation(np.arange(num_units) % number)
    return group_U[unit_P], number


def jackknife_interval(
    estimate_X: FloatArray,
    without_GX: FloatArray,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[FloatArray, FloatArray]:
    """95 % interval of estimates that were computed again without each group.

    Args:
        estimate_X: from all units.
        without_GX: without the units of each group; G is at least 2.
        bounds: smallest and largest possible value; the interval is cut there.

    Returns:
        Lower and upper ends; NaN where there are fewer than 2 groups or a value is undefined.
    """
    number = len(without_GX)
    if number < 2:
        missing: NDArray[np.float64] = np.full(np.shape(estimate_X), np.nan)
        return missing, missing.copy()
    spread = ((without_GX - without_GX.mean(axis=0)) ** 2).sum(axis=0)
    reach = stats.t.ppf((1 + COVERAGE) / 2, number - 1) * np.sqrt((number - 1) / number * spread)
    return np.clip(estimate_X - reach, *bounds), np.clip(estimate_X + reach, *bounds)
