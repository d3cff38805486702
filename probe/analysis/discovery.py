"""Discover on one half, confirm on the other: the testing of a contrast, without the store.

From token counts of units in two groups to candidates with effects, intervals and p. The steps are
those of `moescope.probe.analysis.statistics`; here is their order, and what is refused or noted.

Letters: U units, P parts, X experts of all routers together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moescope.probe.analysis.measures import FloatArray
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.statistics import (
    BoolArray,
    Parts,
    benjamini_hochberg,
    effect_interval,
    permutation_p,
    rank_correlation,
    smallest_p,
    split_halves,
    step_down_max_t,
    strongest,
    top_overlap,
)
from moescope.probe.errors import AnalysisInputError

Average = Literal["pooled", "unit"]
# Permutations per candidate and level: the p of one candidate must be able to fall well below q/n.
PERMUTATIONS_PER_LEVEL = 20

# Max-T needs no resolution for single candidates; this many give p in steps of 0.0005.
MAX_T_PERMUTATIONS = 2_000


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """How a contrast is tested; see `expert_contrast`."""

    average: Average
    split: bool
    candidates: int
    q: float
    bootstrap: int
    permutations: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ContrastResult:
    """What testing found, for all X experts.

    Attributes:
        ranking: the parts that ranked the experts: one half, or all without a split.
        difference: the effect that ranked them.
        candidates: indices of the tested experts, strongest first.
        effect, low, high, p, q: of the candidates, on the data that tested them.
        confirmed: whether q <= level (p without a split), with the sign of the ranking.
        summary: stability, numbers of units, by name.
        notes: what limits the answer.
    """

    ranking: Parts
    difference: FloatArray
    candidates: IntArray
    effect: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    q: FloatArray
    confirmed: BoolArray
    summary: Mapping[str, Any]
    notes: tuple[str, ...]


def contrast_parts(parts: Parts, stratum_U: IntArray, settings: ContrastSettings) -> ContrastResult:
    """The statistics of a contrast, without the store.

    Args:
        parts: token counts of every unit in either group.
        stratum_U: stratum of each unit (label first, then language), ascending.
        settings: how to test.

    Raises:
        AnalysisInputError: when a group has too few units.
    """
    seeds = np.random.SeedSequence(settings.seed).spawn(3)
    split_rng, permutation_rng, bootstrap_rng = (np.random.default_rng(seed) for seed in seeds)
    is_first_U = split_halves(stratum_U, split_rng)
    halves = [parts.rows(is_first_U[parts.units]), parts.rows(~is_first_U[parts.units])]
    ranking, testing = halves if settings.split else [parts, parts]
    _require_units(parts, [ranking, testing], split=settings.split)
    averaged = [half.per_unit() if settings.average == "unit" else half for half in halves]
    if settings.split:
        ranked, tested = averaged
    else:
        ranked = tested = parts.per_unit() if settings.average == "unit" else parts
    difference_X = ranked.effects()
    candidates = strongest(difference_X, settings.candidates)
    chosen = tested.columns(candidates)
    low, high = effect_interval(chosen, settings.bootstrap, bootstrap_rng)
    if settings.split:
        p = permutation_p(chosen, settings.permutations, permutation_rng)
        q = benjamini_hochberg(p)
        significant = q <= settings.q
    else:
        p = step_down_max_t(tested, settings.permutations, permutation_rng)[candidates]
        q = np.full(len(p), np.nan)
        significant = p <= settings.q
    effect = chosen.effects()
    summary = _summary(averaged, settings) | {
        "units_a": int(testing.is_a.sum()),
        "units_b": int((~testing.is_a).sum()),
        "matched_units": len(testing.matched()[0]),
        "candidates": len(candidates),
    }
    confirmed = significant & (np.sign(effect) == np.sign(difference_X[candidates]))
    return ContrastResult(
        ranking=ranking,
        difference=difference_X,
        candidates=candidates,
        effect=effect,
        low=low,
        high=high,
        p=p,
        q=q,
        confirmed=confirmed,
        summary=summary | {"confirmed": int(confirmed.sum())},
        notes=_notes(tested, settings),
    )


def check_settings(
    average: Average,
    split: bool,
    candidates: int,
    q: float,
    bootstrap: int,
    permutations: int | None,
    seed: int,
) -> ContrastSettings:
    """Check the parameters and resolve the number of permutations."""
    if average not in get_args(Average):
        raise AnalysisInputError(f"average is {average!r}; it is pooled or unit")
    for name, number in (("candidates", candidates), ("bootstrap", bootstrap)):
        if number < 1:
            raise AnalysisInputError(f"{name} is {number}; it is a whole number from 1")
    if not 0 < q < 1:
        raise AnalysisInputError(f"q is {q}; it lies between 0 and 1")
    least = math.ceil(PERMUTATIONS_PER_LEVEL * (candidates if split else 1) / q)
    if permutations is None:
        permutations = least if split else max(least, MAX_T_PERMUTATIONS)
    if permutations < least:
        counted = f"{candidates} candidates" if split else "one level"
        raise AnalysisInputError(
            f"{permutations} permutations are too few for {counted} at q = {q:g}; "
            f"{least:,} or more are right"
        )
    return ContrastSettings(
        average=average,
        split=split,
        candidates=candidates,
        q=q,
        bootstrap=bootstrap,
        permutations=permutations,
        seed=seed,
    )


def _require_units(parts: Parts, used: Sequence[Parts], *, split: bool) -> None:
    """Refuse when a group has fewer than 2 units in what ranks or tests."""
    for name, in_group in (("a", True), ("b", False)):
        present = int((parts.is_a == in_group).sum())
        units = "1 unit" if present == 1 else f"{present} units"
        fewest = min(int((half.is_a == in_group).sum()) for half in used)
        if fewest < 2 and split:
            raise AnalysisInputError(
                f"group {name} has {units} with counted tokens, and each half needs 2; "
                "give more prompts, or rank and test on the same data with --no-split"
            )
        if fewest < 2:
            raise AnalysisInputError(
                f"group {name} has {units} with counted tokens; a contrast needs 2"
            )


def _summary(halves: Sequence[Parts], settings: ContrastSettings) -> dict[str, Any]:
    """Split-half stability of the ranking: rank correlation, overlap of the top n."""
    first_X, second_X = (half.effects() for half in halves)
    if np.isnan(first_X).any() or np.isnan(second_X).any():
        return {
            "rank_correlation": math.nan,
            "top_overlap": math.nan,
            "top_overlap_chance": math.nan,
        }
    number = min(settings.candidates, len(first_X))
    return {
        "rank_correlation": rank_correlation(first_X, second_X),
        "top_overlap": top_overlap(first_X, second_X, number),
        "top_overlap_chance": number / len(first_X),
    }


def _notes(tested: Parts, settings: ContrastSettings) -> tuple[str, ...]:
    notes = []
    if not settings.split:
        notes.append(
            "Not split: the effects are optimistic, because the same prompts chose the experts and "
            "measured them. p is adjusted over all experts (step-down max-T); q does not apply."
        )
    least = smallest_p(tested)
    if least > settings.q:
        notes.append(
            f"With so few units no p can be below {least:.3g}: nothing can be confirmed at "
            f"{settings.q:g}, whatever the effects."
        )
    elif settings.split and least * settings.candidates > settings.q:
        together = math.ceil(least * settings.candidates / settings.q)
        notes.append(
            f"With so few units no p can be below {least:.3g}: of {settings.candidates} candidates "
            f"at least {together} must reach it for any to be confirmed. Fewer candidates or more "
            "units would help."
        )
    return tuple(notes)
