"""The parameters of a contrast: checked, and resolved to what holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moescope.probe.analysis.contrasts.methods import METHODS, Average, Measure, Method
from moescope.probe.errors import AnalysisInputError

# Permutations per candidate and level: the p of one candidate must be able to fall well below q/n.
PERMUTATIONS_PER_LEVEL: Final = 20

# Max-T needs no resolution for single candidates; this many give p in steps of 0.0005.
MAX_T_PERMUTATIONS: Final = 2_000

# Of ESFT's token score in its README; of SAFEx "most" resamples, made a number by us.
ESFT_MASS: Final = 0.2
SAFEX_STABILITY: Final = 0.8


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """How a contrast ranks and tests; see `expert_contrast`."""

    method: str
    measure: Measure
    average: Average
    split: bool
    candidates: int
    q: float
    bootstrap: int
    permutations: int
    seed: int
    mass: float | None
    stability: float | None
    markers: Mapping[str, float]


def check_settings(
    *,
    method: str = "risk_difference",
    measure: str | None = None,
    average: str | None = None,
    split: bool = True,
    candidates: int = 50,
    q: float = 0.05,
    bootstrap: int = 1_000,
    permutations: int | None = None,
    seed: int = 0,
    mass: float | None = None,
    stability: float | None = None,
    markers: Sequence[str] | Mapping[str, float] = (),
) -> ContrastSettings:
    """Check the parameters and fill in what the method decides.

    Raises:
        AnalysisInputError: for a value that does not exist or does not fit the method.
    """
    if method not in METHODS:
        raise AnalysisInputError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    for name, number in (("candidates", candidates), ("bootstrap", bootstrap)):
        if number < 1:
            raise AnalysisInputError(f"{name} is {number}; it is a whole number from 1")
    mass = _own(chosen, "esft", "mass", mass, ESFT_MASS)
    stability = _own(chosen, "safex", "stability", stability, SAFEX_STABILITY)
    for name, share in (("q", q), ("mass", mass), ("stability", stability)):
        if share is not None and not 0 < share < 1:
            raise AnalysisInputError(f"{name} is {share}; it lies between 0 and 1")
    if chosen.groups == "one" and method != "npmi" and not split:
        raise AnalysisInputError(
            f"method {method} describes one group on all its units anyway; leave out --no-split"
        )
    coefficients = dict(markers) if isinstance(markers, Mapping) else parse_markers(markers)
    if (method == "npmi") != bool(coefficients):
        raise AnalysisInputError(
            "method npmi needs at least one marker token, as TOKEN or TOKEN=COEFFICIENT, and no "
            "other method takes any"
        )
    return ContrastSettings(
        method=method,
        measure=_of_method(chosen, "measure", measure, chosen.measures),
        average=_of_method(chosen, "average", average, chosen.averages),
        split=split,
        candidates=candidates,
        q=q,
        bootstrap=bootstrap,
        permutations=_permutations(permutations, candidates, q, split=split),
        seed=seed,
        mass=mass,
        stability=stability,
        markers=coefficients,
    )


def parse_markers(texts: Sequence[str]) -> dict[str, float]:
    """Read TOKEN or TOKEN=COEFFICIENT; a token without one has coefficient 1.

    Raises:
        AnalysisInputError: for a coefficient that is no number or 0, or a token given twice.
    """
    markers: dict[str, float] = {}
    for text in texts:
        token, separator, number = text.rpartition("=")
        try:
            value = float(number) if separator else 1.0
        except ValueError:
            token, value = text, 1.0
        token = token if separator and token else text
        if not value or not math.isfinite(value):
            raise AnalysisInputError(f"marker {text!r}: a coefficient is a number other than 0")
        if token in markers:
            raise AnalysisInputError(f"marker {token!r} is given twice; once is right")
        markers[token] = value
    if markers and not any(value > 0 for value in markers.values()):
        raise AnalysisInputError("no marker has a positive coefficient; give at least one")
    return markers


def _own(
    method: Method, family: str, name: str, given: float | None, default: float
) -> float | None:
    """A setting that only one family of methods has; None for the others."""
    if method.name.startswith(family):
        return default if given is None else given
    if given is not None:
        raise AnalysisInputError(
            f"{name} is a setting of {family} and means nothing to method {method.name}"
        )
    return None


def _of_method(method: Method, name: str, given: str | None, offered: Sequence[Any]) -> Any:
    if given is None:
        return offered[0]
    if given not in offered:
        raise AnalysisInputError(
            f"{name} is {given!r}; with method {method.name} it is {' or '.join(offered)}"
        )
    return given


def _permutations(given: int | None, candidates: int, q: float, *, split: bool) -> int:
    least = math.ceil(PERMUTATIONS_PER_LEVEL * (candidates if split else 1) / q)
    if given is None:
        return least if split else max(least, MAX_T_PERMUTATIONS)
    if given < least:
        counted = f"{candidates} candidates" if split else "one level"
        raise AnalysisInputError(
            f"{given} permutations are too few for {counted} at q = {q:g}; "
            f"{least:,} or more are right"
        )
    return given
