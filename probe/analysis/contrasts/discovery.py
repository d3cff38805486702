"""Discover on one half, confirm on the other: the testing of a contrast, without the store.

From the cells of units in two or more classes to candidates with effects, intervals and p; methods
that describe one group have no p. The steps are those of `moescope.probe.analysis.statistics` and
`cells`; here is their order, and what is refused or noted.

Letters: U units, X experts of all routers together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.probe.analysis.cells import Cells, unit_interval
from moescope.probe.analysis.contrasts.rules import Rule
from moescope.probe.analysis.contrasts.settings import ContrastSettings
from moescope.probe.analysis.measures import FloatArray
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.statistics import (
    BoolArray,
    Parts,
    benjamini_hochberg,
    permutation_p,
    rank_correlation,
    smallest_p,
    split_halves,
    step_down_max_t,
    top_overlap,
)
from moescope.probe.errors import AnalysisInputError


@dataclass(frozen=True, kw_only=True, eq=False)
class ContrastResult:
    """What testing found, for all X experts.

    Attributes:
        in_ranking: which cells ranked the experts: those of one half, or all without a split.
        score: what ranked them.
        candidates: indices of the chosen experts, strongest first.
        effect, low, high, p, q: of the candidates, on the data that tested them.
        confirmed: whether q <= level (p without a split), with the sign of the ranking; of methods
            that describe one group, whether each half of the units chooses the expert too.
        summary: stability, numbers of units, by name.
        notes: what limits the answer.
    """

    in_ranking: BoolArray
    score: FloatArray
    candidates: IntArray
    effect: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    q: FloatArray
    confirmed: BoolArray
    summary: Mapping[str, Any]
    notes: tuple[str, ...]


def discover(
    cells: Cells, rule: Rule, stratum_U: IntArray, settings: ContrastSettings
) -> ContrastResult:
    """Rank, choose and test.

    Args:
        cells: what every unit contributes to each class.
        rule: of the method.
        stratum_U: stratum of each unit (label first, then language), ascending.
        settings: how to test.

    Raises:
        AnalysisInputError: when a group has too few units.
    """
    seeds = np.random.SeedSequence(settings.seed).spawn(4)
    rngs = [np.random.default_rng(seed) for seed in seeds]
    is_first_U = split_halves(stratum_U, rngs[0])
    first_N = is_first_U[cells.units]
    if rule.tests is None:
        return _describe(cells, first_N, rule, settings, rngs)
    return _test(cells, first_N, rule, settings, rngs)


def _test(
    cells: Cells,
    first_N: BoolArray,
    rule: Rule,
    settings: ContrastSettings,
    rngs: Sequence[np.random.Generator],
) -> ContrastResult:
    """Two groups: the strongest of one half, tested on the other."""
    _, permutation_rng, bootstrap_rng, ranking_rng = rngs
    halves = [rule.prepared(cells.rows(kept)) for kept in (first_N, ~first_N)]
    whole = rule.prepared(cells)
    ranked, tested = halves if settings.split else (whole, whole)
    _require_units(rule, whole, [ranked, tested], split=settings.split)
    score_X, candidates = rule.rank(ranked, ranking_rng)
    chosen = tested.columns(candidates)
    assert rule.tests is not None
    low, high = unit_interval(chosen, rule.effect, settings.bootstrap, bootstrap_rng)
    if settings.split:
        parts = rule.tests(chosen)
        p = permutation_p(parts, settings.permutations, permutation_rng)
        q = benjamini_hochberg(p)
        significant = q <= settings.q
    else:
        parts = rule.tests(tested)
        p = step_down_max_t(parts, settings.permutations, permutation_rng)[candidates]
        q = np.full(len(p), np.nan)
        significant = p <= settings.q
    effect = chosen.scored(rule.effect)
    agrees = np.sign(effect) == np.sign(ranked.scored(rule.effect)[candidates])
    confirmed = significant & agrees
    summary = _stability([half.scored(rule.effect) for half in halves], settings) | {
        "units_a": int(parts.is_a.sum()),
        "units_b": int((~parts.is_a).sum()),
        "matched_units": len(parts.matched()[0]),
        "candidates": len(candidates),
        "confirmed": int(confirmed.sum()),
    }
    return ContrastResult(
        in_ranking=first_N if settings.split else np.ones_like(first_N),
        score=score_X,
        candidates=candidates,
        effect=effect,
        low=low,
        high=high,
        p=p,
        q=q,
        confirmed=confirmed,
        summary=summary,
        notes=_notes(parts, settings),
    )


def _describe(
    cells: Cells,
    first_N: BoolArray,
    rule: Rule,
    settings: ContrastSettings,
    rngs: Sequence[np.random.Generator],
) -> ContrastResult:
    """One group: the method's own choice on all units, and whether each half makes it too."""
    _, _, bootstrap_rng, ranking_rng = rngs
    whole = rule.prepared(cells)
    halves = [whole.rows(kept) for kept in (first_N, ~first_N)]
    _require_units(rule, whole, halves, split=True)
    score_X, candidates = rule.rank(whole, ranking_rng)
    again = [rule.rank(half, rng) for half, rng in zip(halves, ranking_rng.spawn(2), strict=True)]
    confirmed = np.isin(candidates, again[0][1]) & np.isin(candidates, again[1][1])
    chosen = whole.columns(candidates)
    low, high = unit_interval(chosen, rule.scaled(candidates), settings.bootstrap, bootstrap_rng)
    missing = np.full(len(candidates), np.nan)
    shared = len(np.intersect1d(again[0][1], again[1][1]))
    either = len(np.union1d(again[0][1], again[1][1]))
    return ContrastResult(
        in_ranking=np.ones_like(first_N),
        score=score_X,
        candidates=candidates,
        effect=chosen.scored(rule.scaled(candidates)),
        low=low,
        high=high,
        p=missing,
        q=missing.copy(),
        confirmed=confirmed,
        summary={
            "rank_correlation": rank_correlation(again[0][0], again[1][0]),
            "overlap_of_halves": shared / either if either else math.nan,
            "units_a": whole.units_of(0),
            "candidates": len(candidates),
            "confirmed": int(confirmed.sum()),
        },
        notes=(
            "One group is described, nothing is compared, so there is no p: confirmed says that "
            "each half of the units chooses the expert too.",
        ),
    )


def _require_units(rule: Rule, whole: Cells, used: Sequence[Cells], *, split: bool) -> None:
    """Refuse when a class has fewer than 2 units in what ranks or tests."""
    for number, name in enumerate(rule.class_names):
        present = whole.units_of(number)
        units = "1 unit" if present == 1 else f"{present} units"
        fewest = min(half.units_of(number) for half in used)
        if fewest < 2 and split:
            advice = (
                ""
                if rule.tests is None
                else (", or rank and test on the same data with --no-split")
            )
            raise AnalysisInputError(
                f"{name} has {units} with counted tokens, and each half needs 2; give more "
                f"prompts{advice}"
            )
        if fewest < 2:
            raise AnalysisInputError(f"{name} has {units} with counted tokens; a contrast needs 2")


def _stability(effects: Sequence[FloatArray], settings: ContrastSettings) -> dict[str, Any]:
    """Split-half stability of the ranking: rank correlation, overlap of the top n."""
    first_X, second_X = effects
    known = ~(np.isnan(first_X) | np.isnan(second_X))
    if not known.any():
        return {
            "rank_correlation": math.nan,
            "top_overlap": math.nan,
            "top_overlap_chance": math.nan,
        }
    first_X, second_X = first_X[known], second_X[known]
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
