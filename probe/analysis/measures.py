"""Formulas over distributions: entropy, balance, divergence. Pure numpy, along the last axis.

All logarithms are natural, 0 * ln 0 is 0, and a quantity that is undefined is NaN.

Letters: E experts, the last axis of every argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

FloatArray = NDArray[np.floating[Any]]

# Below this denominator the entropy-normalized divergence is undefined (both sides uniform).
SMALLEST_HEADROOM = 1e-6


def divide(numerator: Any, denominator: Any) -> FloatArray:
    """Elementwise ratio in double precision; NaN where the denominator is 0."""
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    shape = np.broadcast_shapes(top.shape, bottom.shape)
    ratio = np.full(shape, np.nan)
    np.divide(top, bottom, out=ratio, where=np.broadcast_to(bottom != 0, shape))
    return ratio


def normalize(values_E: FloatArray) -> FloatArray:
    """Values divided by their sum over experts; NaN where the sum is 0. Shape [..., E]."""
    return divide(values_E, np.sum(values_E, axis=-1, keepdims=True))


def entropy_nats(shares_E: FloatArray) -> FloatArray:
    """H(p) = -sum p ln p of distributions that sum to 1, in nats. [..., E] -> [...]."""
    return np.asarray(-np.sum(xlogy(shares_E, shares_E), axis=-1))


def gini(values_E: FloatArray) -> FloatArray:
    """Gini coefficient of non-negative values: 0 all alike, (E-1)/E one has all. [..., E] -> [...].

    sum_i (2i - E - 1) x_(i) / (E sum x), x sorted ascending, i from 1. NaN where the sum is 0.
    """
    ordered = np.sort(np.asarray(values_E, dtype=np.float64), axis=-1)
    size = ordered.shape[-1]
    ranks_E = 2.0 * np.arange(1, size + 1) - size - 1
    return divide((ordered * ranks_E).sum(axis=-1), size * ordered.sum(axis=-1))


def imbalance(values_E: FloatArray) -> FloatArray:
    """Largest over mean, minus 1: 0 all alike, E-1 one has all. [..., E] -> [...].

    "MaxVio" of auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664).
    """
    values = np.asarray(values_E, dtype=np.float64)
    return divide(values.max(axis=-1), values.mean(axis=-1)) - 1


def coefficient_of_variation(values_E: FloatArray) -> FloatArray:
    """Standard deviation (over all E, ddof 0) over mean. [..., E] -> [...]."""
    values = np.asarray(values_E, dtype=np.float64)
    return divide(values.std(axis=-1), values.mean(axis=-1))


def jensen_shannon(p_E: FloatArray, q_E: FloatArray) -> FloatArray:
    """Jensen-Shannon divergence in nats, in [0, ln 2]. [..., E] -> [...].

    H(m) - (H(p) + H(q))/2 with m = (p + q)/2, summed term by term so that equal inputs give 0.
    """
    m_E = (p_E + q_E) / 2
    # 0 * ln(0/m) is 0; where m is 0 both p and q are 0.
    safe_m = np.where(m_E > 0, m_E, 1.0)
    terms = xlogy(p_E, p_E / safe_m) + xlogy(q_E, q_E / safe_m)
    return np.asarray(np.clip(terms.sum(axis=-1) / 2, 0.0, np.log(2)))


def entropy_normalized_jsd(p_E: FloatArray, q_E: FloatArray) -> FloatArray:
    """D_HJS = JSD / (ln E - (H(p) + H(q))/2), in [0, 1]; NaN at a denominator <= 1e-6.

    Bandarkar et al., arXiv 2510.04694. The denominator is the largest JSD that two distributions
    of these entropies can have; it is reached only if their mixture is uniform, so two disjoint
    one-hots give ln 2 / ln E. Near-uniform inputs make it large from noise alone: read it beside
    the raw divergence. [..., E] -> [...].
    """
    mean_entropy = (entropy_nats(p_E) + entropy_nats(q_E)) / 2
    headroom = np.log(p_E.shape[-1]) - mean_entropy
    defined = headroom > SMALLEST_HEADROOM
    return divide(jensen_shannon(p_E, q_E), np.where(defined, headroom, 0.0))
