"""What each unit contributes to each class, and intervals of any score made of class sums.

A *class* is a group of prompts (a, b, or one of several outcomes) or of tokens (a marker token, the
rest). Every score of a contrast is a function of two sums a class: what the experts got, and the
tokens (or prompts) that it is divided by. Resampling units resamples both together.

Letters: N cells, U units, C classes, X experts of all routers together, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.statistics import (
    ELEMENTS_PER_CHUNK,
    BoolArray,
    FloatArray,
    bootstrap_weights,
    percentile_interval,
)

Score = Callable[[FloatArray, FloatArray], FloatArray]
"""From counts [..., C, X] and tokens [..., C] to a score [..., X]; NaN where it is undefined."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """Counts by unit and class.

    Attributes:
        counts: what each expert got, [N, X].
        tokens: what it is divided by, above 0, [N].
        units: the unit of each cell; at most one cell a unit and class, [N].
        classes: the class of each cell, from 0, [N].
        num_classes: C.
    """

    counts: FloatArray
    tokens: FloatArray
    units: IntArray
    classes: IntArray
    num_classes: int

    def rows(self, kept_N: BoolArray) -> Cells:
        """Some of the cells."""
        return replace(
            self,
            counts=self.counts[kept_N],
            tokens=self.tokens[kept_N],
            units=self.units[kept_N],
            classes=self.classes[kept_N],
        )

    def columns(self, experts: IntArray) -> Cells:
        """Some of the experts, in double precision."""
        return replace(self, counts=self.counts[:, experts].astype(np.float64))

    def per_unit(self) -> Cells:
        """Rates as counts and one token each: sums become means over units."""
        rates_NX = self.counts / self.tokens[:, None]
        return replace(self, counts=rates_NX, tokens=np.ones(len(self.tokens)))

    def complete(self) -> Cells:
        """The cells of the units that have every class."""
        _, of_N, number_U = np.unique(self.units, return_inverse=True, return_counts=True)
        return self.rows(number_U[of_N] == self.num_classes)

    def units_of(self, number: int) -> int:
        """Units that have a cell of a class."""
        return int((self.classes == number).sum())

    def sums(self) -> tuple[FloatArray, FloatArray]:
        """Counts [C, X] and tokens [C] of every class."""
        counts_CX = np.zeros((self.num_classes, self.counts.shape[1]))
        for number in range(self.num_classes):
            counts_CX[number] = self.counts[self.classes == number].sum(axis=0, dtype=np.float64)
        tokens_C = np.zeros(self.num_classes)
        np.add.at(tokens_C, self.classes, self.tokens)
        return counts_CX, tokens_C

    def scored(self, score: Score) -> FloatArray:
        """The score of all units together, [X]."""
        return score(*self.sums())


def merged(cells: Cells) -> Cells:
    """Cells of one unit and class as one."""
    keys = cells.units * cells.num_classes + cells.classes
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    return replace(
        cells,
        counts=np.add.reduceat(cells.counts[order], starts, axis=0),
        tokens=np.add.reduceat(cells.tokens[order], starts),
        units=found // cells.num_classes,
        classes=found % cells.num_classes,
    )


def two_classes(cells: Cells, in_first: IntArray) -> Cells:
    """The named classes together as class 0, all others as class 1."""
    classes = np.where(np.isin(cells.classes, in_first), 0, 1)
    return merged(replace(cells, classes=classes, num_classes=2))


def difference(counts_CX: FloatArray, tokens_C: FloatArray) -> FloatArray:
    """Rate of class 0 minus rate of class 1."""
    rates_CX = divide(counts_CX, tokens_C[..., None])
    return np.asarray(rates_CX[..., 0, :] - rates_CX[..., 1, :])


def resampled(
    cells: Cells, score: Score, num_draws: int, rng: np.random.Generator
) -> Iterator[FloatArray]:
    """Scores of units drawn with replacement, in chunks [D, X].

    Units with the same classes are resampled among their own, so that no draw lacks a class; all
    cells of a unit are drawn together.
    """
    units, unit_N = np.unique(cells.units, return_inverse=True)
    has_UC = np.zeros((len(units), cells.num_classes), dtype=np.int64)
    has_UC[unit_N, cells.classes] = 1
    _, pattern_U = np.unique(has_UC, axis=0, return_inverse=True)
    pattern_U = pattern_U.reshape(-1)
    width = max(cells.num_classes * cells.counts.shape[1], len(cells.units))
    step = max(1, ELEMENTS_PER_CHUNK // width)
    for start in range(0, num_draws, step):
        chunk = min(step, num_draws - start)
        weights_DU = np.zeros((chunk, len(units)))
        for pattern in np.unique(pattern_U):
            own = pattern_U == pattern
            weights_DU[:, own] = bootstrap_weights(int(own.sum()), chunk, rng)
        counts_DCX = np.zeros((chunk, cells.num_classes, cells.counts.shape[1]))
        tokens_DC = np.zeros((chunk, cells.num_classes))
        for number in range(cells.num_classes):
            kept = cells.classes == number
            weights_DN = weights_DU[:, unit_N[kept]]
            counts_DCX[:, number] = weights_DN @ cells.counts[kept]
            tokens_DC[:, number] = weights_DN @ cells.tokens[kept]
        yield score(counts_DCX, tokens_DC)


def unit_interval(
    cells: Cells, score: Score, num_draws: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """95 % unit-bootstrap interval of the score of every expert, [X] each."""
    return percentile_interval(np.concatenate(list(resampled(cells, score, num_draws, rng))))
