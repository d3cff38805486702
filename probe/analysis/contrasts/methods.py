"""The methods of a contrast: what each ranks experts by, and how its candidates are tested.

Two kinds. Methods that compare (`risk_difference`, `log_odds`, `paired`, `ftri`, `npmi`, `safex` of
two groups) rank on one half and are tested on the other. Methods that describe one group
(`esft_token`, `esft_gate`, `seuf`, `safex` of one group) have no hypothesis to test: they are
computed on all units, and an expert is confirmed when each half of the units selects it as well.

Letters: C classes, X experts of all routers together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from moescope.probe.analysis.cells import Cells, Score, difference, resampled, two_classes
from moescope.probe.analysis.frame import Column
from moescope.probe.analysis.measures import divide
from moescope.probe.analysis.selection import IntArray
from moescope.probe.analysis.statistics import FloatArray, Parts

Average = Literal["pooled", "unit", "prompt", "sum"]
Measure = Literal["selections", "weights", "scores"]

ALL_MEASURES: Final = ("selections", "weights", "scores")
_TOKENS = "share of tokens (with another measure: its mean over tokens)"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to rank experts.

    Attributes:
        name: as the user types it.
        score: what ranks, described.
        groups: `two`, `one` or `either`.
        averages: how tokens are averaged; the first is the default.
        measures: what may be averaged; the first is the default.
        signed: whether strongly negative scores count as much as positive ones.
    """

    name: str
    score: Column
    groups: Literal["two", "one", "either"] = "two"
    averages: tuple[Average, ...] = ("pooled",)
    measures: tuple[Measure, ...] = ALL_MEASURES
    signed: bool = True


def _score(unit: str, values: str, definition: str, source: str) -> Column:
    return Column(name="score", unit=unit, range=values, definition=definition, source=source)


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method(
            name="risk_difference",
            score=_score(
                _TOKENS,
                "[-1, 1] for selections",
                "Rate in a minus rate in b, pooled over tokens or the difference of the means over "
                "units.",
                "SteerMoE, arXiv 2509.09660; mean over units: Bandarkar et al., arXiv 2510.04694",
            ),
            averages=("pooled", "unit"),
        ),
        Method(
            name="log_odds",
            score=_score(
                "nats",
                "any number",
                "ln of the odds that a token of a selects the expert over those of b, with 0.5 "
                "added to each of the four counts.",
                "SteerMoE, arXiv 2509.09660, the columns of its released tables",
            ),
            measures=("selections",),
        ),
        Method(
            name="paired",
            score=_score(
                _TOKENS,
                "[-1, 1] for selections",
                "Mean over the units that have both a and b of the difference of their rates; "
                "other units are left out.",
                "SteerMoE, arXiv 2509.09660 (its paired t is the one of measure scores)",
            ),
            averages=("unit",),
        ),
        Method(
            name="ftri",
            score=_score(
                "share of tokens (average sum: activations a prompt)",
                "[-1, 1] for selections as rates",
                "Mean over the prompts of a minus the mean of the means of the other classes, of "
                "the share of a prompt's tokens that selected the expert, or of their number.",
                "fTRI: Dahlke et al., arXiv 2502.11096; it does not say whether counts are divided "
                "by length, we do unless average is sum",
            ),
            averages=("prompt", "sum"),
        ),
        Method(
            name="npmi",
            score=_score(
                "",
                "the sum of |coefficient| at most; 1 a marker when an expert is used at it alone",
                "Sum over markers of coefficient * (log2(k/M) + log2(T/K)) / log2(T/k), with k the "
                "expert's uses at the marker, K all its uses, M marker tokens, T tokens; -1 for "
                "k = 0.",
                "RICE: Wang et al., arXiv 2505.14681",
            ),
            groups="one",
            measures=("selections",),
            signed=False,
        ),
        Method(
            name="safex",
            score=_score(
                "share of resamples",
                "[0, 1]",
                "In how many resamples of the units the expert is among the n with the highest "
                "rate in a, or, with b, the highest rate difference.",
                "stability selection as in SAFEx, arXiv 2506.17368; its exact score is not known "
                "to us",
            ),
            groups="either",
            measures=("selections",),
            signed=False,
        ),
        Method(
            name="esft_token",
            score=_score(
                "share of slots",
                "[0, 1]; sums to 1 over the experts of a router",
                "Slots of a that went to the expert, over all slots of the router.",
                "ESFT token score: Wang et al., arXiv 2407.01906",
            ),
            groups="one",
            measures=("selections",),
            signed=False,
        ),
        Method(
            name="esft_gate",
            score=_score(
                "routing weight a token",
                "0 or more; sums over a router's experts to the mean sum of weights",
                "Sum of the expert's routing weights over the tokens of a.",
                "ESFT gate score: Wang et al., arXiv 2407.01906",
            ),
            groups="one",
            measures=("weights",),
            signed=False,
        ),
        Method(
            name="seuf",
            score=_score(
                "routing weight a token",
                "0 or more",
                "Mean over the prompts of a of the mean over their tokens of the routing weight.",
                "SEUF affinity: arXiv 2411.18797",
            ),
            groups="one",
            averages=("prompt",),
            measures=("weights",),
            signed=False,
        ),
    )
}
"""Name -> method, in the order in which they are listed."""


def log_odds(counts_CX: FloatArray, tokens_C: FloatArray) -> FloatArray:
    """Log odds ratio of class 0 to class 1, 0.5 added to each cell (Haldane)."""
    active = counts_CX + 0.5
    passive = tokens_C[..., None] - counts_CX + 0.5
    odds = np.log(active) - np.log(passive)
    return np.asarray(odds[..., 0, :] - odds[..., 1, :])


def class_contrast(counts_CX: FloatArray, tokens_C: FloatArray) -> FloatArray:
    """Mean of class 0 minus the mean of the means of the other classes."""
    means_CX = divide(counts_CX, tokens_C[..., None])
    return np.asarray(means_CX[..., 0, :] - means_CX[..., 1:, :].mean(axis=-2))


def rate(counts_CX: FloatArray, tokens_C: FloatArray) -> FloatArray:
    """Rate of class 0."""
    return divide(counts_CX[..., 0, :], tokens_C[..., 0, None])


def npmi_score(coefficients: FloatArray) -> Score:
    """Normalized pointwise mutual information of experts with markers, summed with coefficients.

    Classes are the markers in order and, last, all other tokens.
    """

    def score(counts_CX: FloatArray, tokens_C: FloatArray) -> FloatArray:
        at_marker, markers = counts_CX[..., :-1, :], tokens_C[..., :-1, None]
        uses = counts_CX.sum(axis=-2, keepdims=True)
        tokens = tokens_C.sum(axis=-1)[..., None, None]
        positive = np.where(at_marker > 0, at_marker, np.nan)
        pointwise = np.log2(divide(positive, markers)) + np.log2(divide(tokens, uses))
        npmi = divide(pointwise, np.log2(divide(tokens, positive)))
        never = (at_marker == 0) & (uses > 0) & (markers > 0)
        npmi = np.where(never, -1.0, npmi)
        return np.asarray((npmi * coefficients[:, None]).sum(axis=-2))

    return score


def two_class_parts(cells: Cells) -> Parts:
    """Cells of class 0 as group a, of class 1 as group b."""
    return Parts(
        counts=cells.counts, tokens=cells.tokens, units=cells.units, is_a=cells.classes == 0
    )


def class_parts(cells: Cells) -> Parts:
    """Class 0 as group a and all others as b, weighted so that each other class counts alike.

    A cell of class c weighs 1 / (prompts of c), numerator and denominator both, so that the ratio
    of b is the mean of the means of its classes.
    """
    _, tokens_C = cells.sums()
    weight_C = divide(1.0, tokens_C)
    weight_C[0] = 1.0
    weight_N = weight_C[cells.classes]
    weighted = replace(
        cells, counts=cells.counts * weight_N[:, None], tokens=cells.tokens * weight_N
    )
    return two_class_parts(two_classes(weighted, np.zeros(1, dtype=np.int64)))


def marker_parts(in_a: IntArray) -> Callable[[Cells], Parts]:
    """Rates at the markers that count for an expert (a) against those elsewhere (b), per unit."""
    return lambda cells: two_class_parts(two_classes(cells, in_a).complete().per_unit())


def leading(score_X: FloatArray, number: int, *, signed: bool) -> IntArray:
    """The experts with the largest scores, by size if signed; without those of 0 or below.

    Equal scores go by the expert's number; undefined ones are left out.
    """
    order = leading_order(score_X, signed=signed)[:number]
    key_X = np.abs(score_X) if signed else score_X
    return np.asarray(order[np.nan_to_num(key_X[order], nan=0.0) > 0])


def leading_order(score_X: FloatArray, *, signed: bool) -> IntArray:
    """All experts, the largest score first, by size if signed; undefined ones last."""
    key_X = np.abs(score_X) if signed else score_X
    return np.argsort(-key_X, kind="stable")


def cumulative(score_X: FloatArray, firsts: IntArray, mass: float) -> IntArray:
    """Within each router the experts with the largest scores until they reach a share of the sum.

    Args:
        score_X: non-negative, sums per router as the method defines them (ESFT: not divided again).
        firsts: index of each router's first expert.
        mass: experts are taken in descending order while the sum so far is below it; the one that
            crosses it is taken. Ties go to the lowest expert.
    """
    chosen = []
    for first, own in zip(firsts, np.split(score_X, firsts[1:]), strict=True):
        order = np.argsort(-own, kind="stable")
        before = np.cumsum(own[order]) - own[order]
        # A sum that reaches the mass but for rounding has reached it.
        chosen.append(first + order[(before < mass - 1e-12) & (own[order] > 0)])
    return np.concatenate(chosen)


def stability(
    cells: Cells, score: Score, number: int, num_draws: int, rng: np.random.Generator
) -> FloatArray:
    """In which share of resamples of the units each expert is among the `number` highest, [X]."""
    kept_X = np.zeros(cells.counts.shape[1])
    for scores_DX in resampled(cells, score, num_draws, rng):
        number = min(number, scores_DX.shape[1])
        highest = np.argpartition(-scores_DX, number - 1, axis=1)[:, :number]
        kept_X += np.bincount(highest.ravel(), minlength=len(kept_X))
    return kept_X / num_draws


SCORES: Final[Mapping[str, Score]] = {
    "risk_difference": difference,
    "log_odds": log_odds,
    "paired": difference,
    "ftri": class_contrast,
    "esft_token": rate,
    "esft_gate": rate,
    "seuf": rate,
}
