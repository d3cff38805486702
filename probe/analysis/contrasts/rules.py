"""A method made ready for one contrast: how its cells are prepared, ranked, chosen and tested.

Letters: C classes, X experts of all routers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moescope.probe.analysis.cells import Cells, Score, difference
from moescope.probe.analysis.contrasts.methods import (
    METHODS,
    SCORES,
    class_parts,
    cumulative,
    leading,
    marker_parts,
    npmi_score,
    rate,
    stability,
    two_class_parts,
)
from moescope.probe.analysis.contrasts.settings import ContrastSettings
from moescope.probe.analysis.selection import IntArray, Router
from moescope.probe.analysis.statistics import FloatArray, Parts

Ranking = tuple[FloatArray, IntArray]
"""A score of every expert, [X], and the experts chosen by it, strongest first."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a contrast does with cells.

    Attributes:
        class_names: what messages call each class.
        prepared: cells as they are summed (rates per unit, matched units alone, or as they are).
        effect: what is measured on the data that tests.
        rank: scores and choice, from prepared cells.
        tests: the two groups whose labels are permuted, or None where nothing is compared.
        scale: what the effect of each expert is divided by.
        chance: the score of every expert if none were preferred.
    """

    class_names: tuple[str, ...]
    prepared: Callable[[Cells], Cells]
    effect: Score
    rank: Callable[[Cells, np.random.Generator], Ranking]
    tests: Callable[[Cells], Parts] | None
    scale: FloatArray
    chance: FloatArray

    def scaled(self, experts: IntArray) -> Score:
        """The effect of some experts, divided by what it is a share of."""
        scale = self.scale[experts]
        return lambda counts_CX, tokens_C: self.effect(counts_CX, tokens_C) / scale


def make_rule(
    settings: ContrastSettings,
    routers: Sequence[Router],
    cells: Cells,
    class_names: tuple[str, ...],
) -> Rule:
    """The rule of a contrast's method.

    Args:
        settings: the parameters.
        routers: in the order in which their experts stand side by side.
        cells: all cells, for what is a share of all slots.
        class_names: of the classes.
    """
    experts = [router.num_experts for router in routers]
    firsts = np.cumsum([0, *experts[:-1]])
    size = sum(experts)
    name = settings.method
    two_groups = cells.num_classes > 1
    method, number = METHODS[name], settings.candidates

    def strongest(effect: Score) -> Callable[[Cells, np.random.Generator], Ranking]:
        def rank(own: Cells, rng: np.random.Generator) -> Ranking:
            score_X = own.scored(effect)
            return score_X, leading(score_X, number, signed=method.signed)

        return rank

    effect = SCORES.get(name, difference)
    rank = strongest(effect)
    tests: Callable[[Cells], Parts] | None = two_class_parts if two_groups else None
    scale_X, chance_X = np.ones(size), np.zeros(size)
    if name == "ftri":
        tests = class_parts
    elif name == "npmi":
        coefficients = np.array(list(settings.markers.values()))
        effect = npmi_score(coefficients)
        rank, tests = strongest(effect), marker_parts(np.flatnonzero(coefficients > 0))
    elif name == "safex":
        effect = difference if two_groups else rate
        rank = _stable(effect, settings)
        chance_X = np.full(size, min(number / size, 1.0))
    elif not two_groups:
        sums_X = np.add.reduceat(cells.scored(rate), firsts)
        mean_X = np.repeat(sums_X / experts, experts)
        if name == "esft_token":
            scale_X = np.repeat(sums_X, experts)
        chance_X = mean_X / scale_X
        if settings.mass is not None:
            rank = _cumulative(firsts, scale_X, settings.mass)
    return Rule(
        class_names=class_names,
        prepared=_preparation(settings),
        effect=effect,
        rank=rank,
        tests=tests,
        scale=scale_X,
        chance=chance_X,
    )


def _preparation(settings: ContrastSettings) -> Callable[[Cells], Cells]:
    if settings.method == "paired":
        return lambda cells: cells.complete().per_unit()
    if settings.average == "unit":
        return Cells.per_unit
    return lambda cells: cells


def _stable(
    effect: Score, settings: ContrastSettings
) -> Callable[[Cells, np.random.Generator], Ranking]:
    """Rank by how often resamples put an expert among the n highest."""
    least = settings.stability
    assert least is not None  # every SAFEx has one

    def rank(cells: Cells, rng: np.random.Generator) -> Ranking:
        kept_X = stability(cells, effect, settings.candidates, settings.bootstrap, rng)
        order = np.lexsort((-cells.scored(effect), -kept_X))[: settings.candidates]
        return kept_X, order[kept_X[order] >= least]

    return rank


def _cumulative(
    firsts: IntArray, scale: FloatArray, mass: float
) -> Callable[[Cells, np.random.Generator], Ranking]:
    """ESFT's choice: within each router until the scores reach a share."""

    def rank(cells: Cells, rng: np.random.Generator) -> Ranking:
        score_X = cells.scored(rate) / scale
        return score_X, cumulative(score_X, firsts, mass)

    return rank
