"""Mean effects and shares of a whole, with intervals over units: columns of the tables here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval

_DRAWS = 2_000
#: Rows whose draws are held at once; a model can have many thousand experts.
_AT_ONCE = 512


def effect_columns(
    values_XP: NDArray[np.float64], units: Sequence[str], seed: int
) -> dict[str, NDArray[Any]]:
    """`effect`, `low`, `high` and `n` of each row: the mean over prompts, its 95 % interval.

    The same as `moescope.steering.rates.mean_over_units` of each row: whole units are resampled,
    sums and counts together; with fewer than two there is no interval (NaN).

    Args:
        values_XP: one number per row and prompt.
        units: of each prompt.
        seed: of the resampling.
    """
    share = share_columns(values_XP, np.ones(len(units)), units, seed)
    return {
        "effect": share["share"],
        "low": share["share_low"],
        "high": share["share_high"],
        "n": np.full(len(values_XP), len(units)),
    }


def share_columns(
    parts_XP: NDArray[np.float64], wholes_P: NDArray[np.float64], units: Sequence[str], seed: int
) -> dict[str, NDArray[np.float64]]:
    """`share`, `share_low` and `share_high`: the sum of the parts over the sum of the wholes.

    A ratio of means, not a mean of ratios, so that prompts without a whole do no harm; part and
    whole are resampled together. NaN where the wholes sum to 0.

    Args:
        parts_XP: one number per row and prompt.
        wholes_P: what they are parts of.
        units: of each prompt.
        seed: of the resampling.
    """
    _, unit_of = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    num_units = int(unit_of.max()) + 1
    is_in_PU = np.zeros((len(units), num_units))
    is_in_PU[np.arange(len(units)), unit_of] = 1.0
    part_XU, whole_U = parts_XP @ is_in_PU, wholes_P @ is_in_PU
    low, high = np.full((2, len(part_XU)), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = part_XU.sum(1) / whole_U.sum()
        if num_units > 1:
            weights_DU = bootstrap_weights(num_units, _DRAWS, np.random.default_rng(seed))
            wholes_D1 = (weights_DU @ whole_U)[:, None]
            for start in range(0, len(part_XU), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                draws_DX = (weights_DU @ part_XU[some].T) / wholes_D1
                low[some], high[some] = percentile_interval(
                    np.where(np.isfinite(draws_DX), draws_DX, np.nan)
                )
    return {
        "share": np.where(np.isfinite(share), share, np.nan),
        "share_low": low,
        "share_high": high,
    }
