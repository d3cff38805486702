"""Honest statistics on units: bootstrap, halves, permutation of labels, multiplicity.

A *unit* is what was sampled independently: an item with all its templates and translations, or a
prompt; never a token. A *part* is what one unit contributes to one group: a unit in which both
labels occur (a matched pair) has two parts. Effects are differences of rates

    R_a - R_b,   R = sum of counts over parts / sum of tokens over parts,

pooled over tokens, or with counts replaced by per-part rates and tokens by 1, the mean over units.
Numerator and denominator are always resampled together (`cells` has the bootstrap).

Everything is a product of a weight matrix [draws, parts] with the counts [parts, experts], so that
15,000 experts cost little more than 50. Random generators are handed in; nothing seeds itself.

Letters: U units, P parts, X experts of all routers together, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moescope.probe.analysis.measures import divide

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Added to every standard error: a difference of rates this small is nothing, and a group without
# any variance (all units alike) still gets a finite statistic.
SMALLEST_ERROR = 1e-6

# Statistics that differ by less than this share count as equal, so that a relabelling which is the
# observed one again is not lost to rounding.
TIE = 1e-6

# Draws are taken so many at a time that no intermediate array has more elements than this.
ELEMENTS_PER_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """What each unit contributes to each of two groups.

    Attributes:
        counts: tokens of the part that selected each expert, [P, X].
        tokens: tokens of the part, above 0.
        units: the unit it belongs to.
        is_a: whether it belongs to group a (else to b). A unit has at most one part in each.
    """

    counts: FloatArray
    tokens: FloatArray
    units: IntArray
    is_a: BoolArray

    def matched(self) -> tuple[IntArray, IntArray]:
        """Indices of the parts in a and in b of the units that have both, in the same order."""
        in_a, in_b = np.flatnonzero(self.is_a), np.flatnonzero(~self.is_a)
        _, first, second = np.intersect1d(
            self.units[in_a], self.units[in_b], assume_unique=True, return_indices=True
        )
        return in_a[first], in_b[second]

    def rates(self) -> tuple[FloatArray, FloatArray]:
        """R_a and R_b of every expert, [X] each; NaN for a group without parts."""
        rates = []
        for kept_P in (self.is_a, ~self.is_a):
            counts_X = self.counts[kept_P].sum(axis=0, dtype=np.float64)
            rates.append(divide(counts_X, self.tokens[kept_P].sum()))
        return rates[0], rates[1]

    def effects(self) -> FloatArray:
        """R_a - R_b of every expert, [X]."""
        rate_a_X, rate_b_X = self.rates()
        return rate_a_X - rate_b_X


def bootstrap_weights(num_units: int, num_draws: int, rng: np.random.Generator) -> FloatArray:
    """How often each unit is drawn when units are resampled with replacement, [D, U]."""
    shares = np.full(num_units, 1 / num_units)
    return rng.multinomial(num_units, shares, size=num_draws).astype(np.float64)


def percentile_interval(draws_DX: FloatArray, coverage: float = 0.95) -> tuple[Any, Any]:
    """Percentile bootstrap interval of each column; draws that are undefined are left out.

    Returns NaN for both ends where no draw is defined.
    """
    ends = [(1 - coverage) / 2, (1 + coverage) / 2]
    missing_DX = np.isnan(draws_DX)
    if not missing_DX.any():
        low, high = np.quantile(draws_DX, ends, axis=0)
        return low, high
    low, high = np.full((2, draws_DX.shape[1]), np.nan)
    known_X = ~missing_DX.all(axis=0)
    if not known_X.any():
        return low, high
    low[known_X], high[known_X] = np.nanquantile(draws_DX[:, known_X], ends, axis=0)
    return low, high


def split_halves(stratum_U: IntArray, rng: np.random.Generator) -> BoolArray:
    """Which units make the first of two halves, [U].

    Units are shuffled within their stratum and dealt out in turn through the strata in ascending
    order, so that every stratum, and every run of neighboring strata, is halved to within one unit.
    """
    order = np.lexsort((rng.random(len(stratum_U)), stratum_U))
    is_first_U = np.zeros(len(stratum_U), dtype=bool)
    is_first_U[order[int(rng.integers(2)) :: 2]] = True
    return is_first_U


def smallest_p(parts: Parts) -> float:
    """The smallest two-sided p that relabelling these parts can give, however many draws.

    The observed labels are one of all assignments; where their mirror image (a and b exchanged)
    is another, it gives the same absolute statistic.
    """
    in_a, _ = parts.matched()
    singles = len(parts.is_a) - 2 * len(in_a)
    singles_in_a = int(parts.is_a.sum()) - len(in_a)
    assignments = math.comb(singles, singles_in_a) * 2 ** len(in_a)
    mirrored = 2 * singles_in_a == singles
    same = 2 if mirrored and assignments > 1 else 1
    return float(same / assignments)


def permuted_labels(parts: Parts, num_draws: int, rng: np.random.Generator) -> BoolArray:
    """Random relabellings, [D, P]: swapped within matched units, permuted over the others."""
    in_a, in_b = parts.matched()
    single_P = np.ones(len(parts.is_a), dtype=bool)
    single_P[in_a] = single_P[in_b] = False
    is_a_DP = np.empty((num_draws, len(parts.is_a)), dtype=bool)
    tiled = np.tile(parts.is_a[single_P], (num_draws, 1))
    is_a_DP[:, single_P] = rng.permuted(tiled, axis=1)
    kept = rng.random((num_draws, len(in_a))) < 0.5
    is_a_DP[:, in_a] = kept
    is_a_DP[:, in_b] = ~kept
    return is_a_DP


class StudentizedDifference:
    """The effect over its standard error, for many relabellings of the same parts at once.

    The standard error is that of the linearized difference of ratios: with e = count - R * tokens
    of each part and N the tokens of a group, the variance is the sum over units of
    (e_a / N_a - e_b / N_b)^2, each group's terms times n / (n - 1) for its n parts. A matched unit
    enters with both its parts, so pairing narrows the error. Studentizing keeps the permutation
    test valid when the groups differ in length and spread (Chung and Romano, Ann. Stat. 2013).
    """

    def __init__(self, parts: Parts) -> None:
        """Prepare the products that do not depend on the labels."""
        # Centering on the common rate changes no difference and saves digits.
        common_X = parts.counts.sum(axis=0) / parts.tokens.sum()
        counts_PX = parts.counts - common_X * parts.tokens[:, None]
        tokens_P = parts.tokens
        self._tokens_P = tokens_P
        self._num_experts = counts_PX.shape[1]
        # One product with these stacked columns gives every sum over group a.
        self._stacked = np.hstack([counts_PX, counts_PX**2, counts_PX * tokens_P[:, None]])
        self._totals = self._stacked.sum(axis=0)
        self._in_a, self._in_b = parts.matched()
        first, second = counts_PX[self._in_a], counts_PX[self._in_b]
        tokens_first, tokens_second = tokens_P[self._in_a], tokens_P[self._in_b]
        self._both_counts = (first * second).sum(axis=0)
        self._both_tokens = float((tokens_first * tokens_second).sum())
        self._first_cross = first * tokens_second[:, None]
        self._second_cross = second * tokens_first[:, None]

    def __call__(self, is_a_DP: BoolArray) -> FloatArray:
        """The statistic of each relabelling and expert, [D, X]."""
        in_a, in_b = is_a_DP.astype(np.float64), (~is_a_DP).astype(np.float64)
        tokens_a, tokens_b = (in_a @ self._tokens_P)[:, None], (in_b @ self._tokens_P)[:, None]
        stacked_a = in_a @ self._stacked
        rate_a, variance_a = self._group(stacked_a, in_a, tokens_a)
        rate_b, variance_b = self._group(self._totals - stacked_a, in_b, tokens_b)
        variance = variance_a + variance_b
        if len(self._in_a):
            kept = in_a[:, self._in_a]
            # Sums over matched units of (count in a * tokens in b) and of the reverse.
            cross = kept @ self._first_cross + (1 - kept) @ self._second_cross
            reverse = self._first_cross.sum(axis=0) + self._second_cross.sum(axis=0) - cross
            covariance = (
                self._both_counts
                - rate_b * cross
                - rate_a * reverse
                + rate_a * rate_b * self._both_tokens
            )
            correction = np.sqrt(_small_sample(in_a) * _small_sample(in_b))
            variance -= 2 * correction * covariance / (tokens_a * tokens_b)
        return (rate_a - rate_b) / np.sqrt(np.maximum(variance, 0) + SMALLEST_ERROR**2)

    def _group(
        self, stacked: FloatArray, members_DP: FloatArray, tokens: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Rate and variance of one group, [D, X] each."""
        size = self._num_experts
        counts, squares, crossed = (
            stacked[:, :size],
            stacked[:, size : 2 * size],
            stacked[:, 2 * size :],
        )
        rate = counts / tokens
        squared_tokens = (members_DP @ self._tokens_P**2)[:, None]
        residual = squares - 2 * rate * crossed + rate**2 * squared_tokens
        return rate, _small_sample(members_DP) * residual / tokens**2


def permutation_p(parts: Parts, num_draws: int, rng: np.random.Generator) -> FloatArray:
    """Two-sided permutation p of every effect: (b + 1) / (D + 1), not adjusted, [X]."""
    statistic = StudentizedDifference(parts)
    observed_X = np.abs(statistic(parts.is_a[None])[0])
    exceeded_X = np.zeros(len(observed_X))
    for chunk in _chunks(num_draws, parts):
        drawn_DX = np.abs(statistic(permuted_labels(parts, chunk, rng)))
        exceeded_X += (drawn_DX >= observed_X * (1 - TIE)).sum(axis=0)
    return (exceeded_X + 1) / (num_draws + 1)


def step_down_max_t(parts: Parts, num_draws: int, rng: np.random.Generator) -> FloatArray:
    """Step-down max-T adjusted p of every effect (Westfall and Young 1993, algorithm 4.1), [X].

    Controls the chance of any false finding over all X experts, whatever their dependence.
    """
    statistic = StudentizedDifference(parts)
    observed_X = np.abs(statistic(parts.is_a[None])[0])
    order = np.argsort(-observed_X, kind="stable")
    exceeded_X = np.zeros(len(observed_X))
    for chunk in _chunks(num_draws, parts):
        drawn_DX = np.abs(statistic(permuted_labels(parts, chunk, rng)))[:, order]
        largest_DX = np.maximum.accumulate(drawn_DX[:, ::-1], axis=1)[:, ::-1]
        exceeded_X += (largest_DX >= observed_X[order] * (1 - TIE)).sum(axis=0)
    adjusted_X = np.empty(len(observed_X))
    adjusted_X[order] = np.maximum.accumulate((exceeded_X + 1) / (num_draws + 1))
    return adjusted_X


def benjamini_hochberg(p_X: FloatArray) -> FloatArray:
    """Adjusted p (q) of Benjamini and Hochberg (1995); empty stays empty."""
    if not len(p_X):
        return p_X
    return np.asarray(stats.false_discovery_control(p_X, method="bh"))


def rank_correlation(first_X: FloatArray, second_X: FloatArray) -> float:
    """Spearman correlation over the experts; NaN when one side is constant."""
    first, second = stats.rankdata(first_X), stats.rankdata(second_X)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def strongest(effects_X: FloatArray, number: int) -> IntArray:
    """The experts with the largest absolute effects, largest first, without effects of 0."""
    order = np.argsort(-np.abs(effects_X), kind="stable")[:number]
    return np.asarray(order[effects_X[order] != 0])


def top_overlap(first_X: FloatArray, second_X: FloatArray, number: int) -> float:
    """Share of the `number` strongest experts of one side that are among those of the other."""
    shared = np.intersect1d(strongest(first_X, number), strongest(second_X, number))
    return len(shared) / min(number, len(first_X))


def _small_sample(members_DP: FloatArray) -> FloatArray:
    """The factor n / (n - 1) of each draw's group, [D, 1]; 1 for a single part."""
    size = members_DP.sum(axis=1, keepdims=True)
    return np.asarray(size / np.maximum(size - 1, 1))


def _chunks(num_draws: int, parts: Parts) -> Iterator[int]:
    """Sizes of the chunks in which draws are taken."""
    width = max(3 * parts.counts.shape[1], parts.counts.shape[0])
    step = max(1, ELEMENTS_PER_CHUNK // width)
    for start in range(0, num_draws, step):
        yield min(step, num_draws - start)
