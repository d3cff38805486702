"""Rates and changes with intervals: the arithmetic of an evaluation, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest

from moescope.probe.analysis.statistics import bootstrap_weights, percentile_interval
from moescope.probe.prompts import Prompt

_DRAWS = 2_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of an evaluation.

    Attributes:
        condition: `unsteered`, `steered`, `control:NAME:SEED`.
        group: the prompts' label, or `all`.
        metric: what was measured.
        value: the measure; None where nothing could be measured.
        low, high: ends of the 95 % interval, None where there is none.
        n: prompts (for routing: requests) behind it.
    """

    condition: str
    group: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int


def unit_of(prompt: Prompt) -> str:
    """What was sampled independently: the pair, or the prompt itself."""
    return f"pair {prompt.pair_id}" if prompt.pair_id is not None else f"prompt {prompt.prompt_id}"


def measured_frame(rows: Sequence[Measured]) -> pd.DataFrame:
    """The rows as a table; missing numbers are NaN."""
    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(Measured.__dataclass_fields__))
    return frame.astype({"value": float, "low": float, "high": float, "n": int})


def rate(hits: Sequence[bool]) -> tuple[float, float, float]:
    """Share of hits with its 95 % Wilson interval, which takes prompts as independent."""
    found = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return sum(hits) / len(hits), float(found.low), float(found.high)


def mean_over_units(
    values: Sequence[float], units: Sequence[str], seed: int
) -> tuple[float, float | None, float | None]:
    """Mean of values with a 95 % bootstrap interval over units.

    Whole units are drawn with replacement, sums and counts together. With fewer than two units
    there is no interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    _, unit_of = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    num_units = int(unit_of.max()) + 1
    mean = float(numbers.mean())
    if num_units < 2:
        return mean, None, None
    sum_U = np.bincount(unit_of, weights=numbers)
    count_U: NDArray[np.float64] = np.bincount(unit_of).astype(np.float64)
    weights_DU = bootstrap_weights(num_units, _DRAWS, np.random.default_rng(seed))
    draws_D1 = ((weights_DU @ sum_U) / (weights_DU @ count_U))[:, None]
    low, high = percentile_interval(draws_D1)
    return mean, float(low[0]), float(high[0])
